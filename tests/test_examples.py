"""Every script in examples/ runs as it stands, learns, and needs few packages."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# What comes with the library, and what else a script may need, as its docstring says.
LIBRARY = {"optax_tricks", "jax", "optax"}
NEEDS = {"flax": "optax_tricks[nnx]", "equinox": "Equinox", "sklearn": "scikit-learn"}


def modules(script: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script once and returns what it prints."""
    printed = {}

    def output(name: str) -> str:
        if name not in printed:
            script = ROOT / "examples" / name
            for module in modules(script):
                pytest.importorskip(module)
            done = subprocess.run(
                [sys.executable, "-W", "error", script],
                cwd=tmp_path_factory.mktemp("empty"),
                # The library of this checkout, wherever the installed one is from.
                env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            printed[name] = done.stdout
        return printed[name]

    return output


def numbers(label: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{label} ([\d.]+)", text)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example_says_what_it_needs(script):
    imported = modules(script)
    assert imported <= LIBRARY | NEEDS.keys()
    head = ast.get_docstring(ast.parse(script.read_text()))
    assert {key for key, name in NEEDS.items() if name in head} == imported - LIBRARY


@pytest.mark.parametrize(
    ("name", "accuracies", "at_least"),
    [
        ("plain_jax.py", 5, 0.85),
        ("flax_nnx.py", 1, 0.9),
        # Together they would make a run of the fast tests noticeably longer.
        pytest.param("flax_nnx_optimizer.py", 2, 0.9, marks=pytest.mark.slow),
        pytest.param("flax_linen.py", 1, 0.9, marks=pytest.mark.slow),
        pytest.param("equinox_model.py", 1, 0.9, marks=pytest.mark.slow),
        pytest.param("sharded_accumulation.py", 2, 0.85, marks=pytest.mark.slow),
    ],
)
def test_example_learns_digits(run, name, accuracies, at_least):
    found = numbers("test accuracy", run(name))
    assert len(found) == accuracies
    assert min(found) > at_least  # a guess is right for a tenth of them


@pytest.mark.slow
def test_devices_and_parts_change_nothing(run):
    whole, parts = numbers("loss", run("sharded_accumulation.py"))
    assert parts == pytest.approx(whole, abs=1e-3)


def test_own_technique_learns(run):
    text = run("your_own_technique.py")
    (first, *_), (last,) = numbers("loss", text), numbers("last loss", text)
    assert last < first / 10
    assert all(0 < cosine <= 1 for cosine in numbers("cosine", text))


def test_every_example_is_run():
    source = Path(__file__).read_text()
    assert all(f'"{script.name}"' in source for script in SCRIPTS)
