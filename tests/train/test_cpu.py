"""Commands set up the CPU before JAX has made its devices."""

import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from train import cpu

START = """
import sys

import jax
import jax.numpy as jnp

from train.command_line import run_command

if "command" in sys.argv:
    run_command(lambda: None)
"""

# The result of a step is 64 MiB, or 16,384 pages. By default, glibc gets them anew.
STEPS = """
import resource

step = jax.jit(lambda x: jnp.full(2**24, x))

steps, faults = 50, []
for _ in range(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(1.0).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The first steps, and one whose predecessor is freed late, need memory.
print(sorted(faults)[steps * 3 // 4])
"""

CONVOLUTION = """
def convolve(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )

x, kernel = jnp.ones((4, 16, 16, 64)), jnp.ones((3, 3, 64, 64))
print("ynn" in jax.jit(convolve).lower(x, kernel).compile().as_text())
"""

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def printed(program, *arguments, **variables):
    result = subprocess.run(
        [sys.executable, "-c", START + program, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_steps_of_a_command_use_the_memory_of_the_step_before():
    by_default = int(printed(STEPS))
    assert by_default >= 32  # if all pages are as large as 2 MiB
    assert int(printed(STEPS, "command")) < by_default / 3


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is for x86-64")
def test_convolutions_of_a_command_are_of_eigen():
    assert printed(CONVOLUTION, XLA_FLAGS="") == "True"
    assert printed(CONVOLUTION, "command", XLA_FLAGS="") == "False"
    own = f"{FLAG}=individual_convolution"
    assert printed(CONVOLUTION, "command", XLA_FLAGS=own) == "True"


@pytest.mark.parametrize(
    ("version", "machine", "flags", "expected"),
    [
        ("0.10.0", "x86_64", "", f"{FLAG}=-individual_convolution"),
        ("0.12.0.1", "AMD64", "--a=1", f"--a=1 {FLAG}=-individual_convolution"),
        ("0.12.0", "x86_64", f"{FLAG}=-reduce", f"{FLAG}=-reduce"),
        ("0.13.0", "x86_64", "--a=1", "--a=1"),
        ("0.9.2", "x86_64", "--a=1", "--a=1"),
        ("0.12.0", "aarch64", "--a=1", "--a=1"),
    ],
)
def test_the_flag_is_added_where_jaxlib_has_it(
    monkeypatch, version, machine, flags, expected
):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("XLA_FLAGS", flags)
    cpu._convolve_by_eigen()
    assert os.environ["XLA_FLAGS"] == expected
