"""A second start of a command compiles nothing."""

import os
import subprocess
import sys

import jax
import pytest

from train import command_line, compilation_cache

# Two programs, so that a cache of one is not enough.
PROGRAM = """
import jax, jax.numpy as jnp

from train.compilation_cache import keep_compiled_programs

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
keep_compiled_programs()
x = jax.jit(lambda x: jnp.sin(x) + 1)(jnp.arange(3.0))
y = jax.jit(lambda x: jnp.cos(x) * x)(x)
print(y.sum())
for name in ("hits", "misses"):
    print(name, events.count(f"/jax/compilation_cache/cache_{name}"))
"""


def run_python(program, **environment):
    """Returns the lines that a program prints, of which none may be a warning."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not result.stderr
    return result.stdout.splitlines()


def run(**environment):
    """Runs two programs, and returns what they print and their hits and misses."""
    value, hits, misses = run_python(PROGRAM, **environment)
    return value, int(hits.split()[1]), int(misses.split()[1])


def entries(folder):
    return [path for path in folder.rglob("*-cache") if path.is_file()]


def test_second_start_compiles_nothing(tmp_path):
    value, hits, misses = run(XDG_CACHE_HOME=str(tmp_path))
    assert hits == 0
    assert misses == len(entries(tmp_path)) >= 2
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (value, misses, 0)


STEPS = """
import hashlib

from train.program import open_program
from train.tasks import TASKS

for task in TASKS.values():
    config = task.config_type()
    program, _ = open_program(config)
    text = program.step.lower(program.abstract_state, program.abstract_feed).as_text()
    print(config.task, hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.slow
def test_every_process_makes_the_same_programs():
    """Others would not be found in the cache."""
    made = [run_python(STEPS, PYTHONHASHSEED=str(seed)) for seed in range(2)]
    assert len(made[0]) == 3
    assert made[0] == made[1]


def cut(folder):
    for path in entries(folder):
        path.write_bytes(path.read_bytes()[:-10])


def empty(folder):
    for path in entries(folder):
        path.write_bytes(b"")


def replace_by_file(folder):
    (folder / "optax_tricks").rename(folder / "moved")
    (folder / "optax_tricks").write_text("")


def replace_by_folders(folder):
    for path in entries(folder):
        path.unlink()
        path.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, empty, replace_by_file, replace_by_folders])
def test_damaged_cache_is_as_good_as_none(damage, tmp_path):
    value, *_ = run(XDG_CACHE_HOME=str(tmp_path))
    damage(tmp_path)
    found, hits, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert (found, hits) == (value, 0)


def test_user_without_a_home_folder_keeps_nothing(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compilation_cache.Path, "home", home)
    given = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.keep_compiled_programs()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", given)


def test_folder_that_jax_was_given_is_kept(tmp_path):
    given, caches = tmp_path / "given", tmp_path / "caches"
    run(JAX_COMPILATION_CACHE_DIR=str(given), XDG_CACHE_HOME=str(caches))
    assert not caches.exists()


@pytest.mark.parametrize(
    ("arguments", "is_kept"),
    [
        (["work"], True),
        (["work", "--no-compilation-cache"], False),
        (["measure"], False),
    ],
)
def test_commands_that_keep_programs(arguments, is_kept, monkeypatch):
    def work(*, size: int) -> None:
        """Works."""
        calls.append(size)

    calls = []
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--size", "3"])
    monkeypatch.setattr(
        command_line, "keep_compiled_programs", lambda: calls.append("kept")
    )
    command_line.choose_command(
        {"work": work, "measure": work},
        prog="python -m x",
        description="",
        compile_anew=["measure"],
    )
    assert calls == ["kept"] * is_kept + [3]
