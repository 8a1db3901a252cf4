"""Steps of a command use the memory of the step before."""

import platform
import subprocess
import sys

import pytest

# The result of a step is 64 MiB, or 16,384 pages. By default, glibc gets them anew.
PROGRAM = """
import resource, sys

import jax
import jax.numpy as jnp

from train.command_line import run_command

if "command" in sys.argv:
    run_command(lambda: None)
step = jax.jit(lambda x: jnp.full(2**24, x))

steps, faults = 50, []
for _ in range(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(1.0).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The first steps, and one whose predecessor is freed late, need memory.
print(sorted(faults)[steps * 3 // 4])
"""


def page_faults_of_a_step(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_steps_of_a_command_use_the_memory_of_the_step_before():
    by_default = page_faults_of_a_step()
    assert by_default >= 32  # if all pages are as large as 2 MiB
    assert page_faults_of_a_step("command") < by_default / 3
