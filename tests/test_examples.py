"""Everything in examples/ runs with the wheel alone, learns, and needs few packages."""

import ast
import functools
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.wheel_environment import imports

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# What comes with the library, and what else a script may need, as its docstring says.
LIBRARY = {"optax_tricks", "jax", "optax"}
NEEDS = {"flax": "optax_tricks[nnx]", "equinox": "Equinox", "sklearn": "scikit-learn"}
# The notebook also has numpy, which comes with jax, a table and a plot.
NOTEBOOK = ROOT / "examples" / "does_it_help.ipynb"
NOTEBOOK_NEEDS = {
    "flax": "optax_tricks[nnx]",
    "matplotlib": "matplotlib",
    "numpy": "optax_tricks",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
COMPARED = [
    ("Gradient Centralization", "SGD"),
    ("Random Gradient", "SGD, momentum 0.5"),
    ("Step-Tuned SGD", "SGD"),
    ("Step-Tuned SGD", "SGD, 2x epochs"),
    ("PUGD", "SGD"),
    ("PUGD", "SGD, 2x epochs"),
]


def modules(code: str) -> set[str]:
    return imports(code) - sys.stdlib_module_names


@pytest.fixture(scope="module")
def run(with_extras):
    """Runs a script once, with the wheel alone, and returns what it prints."""

    @functools.cache
    def output(name: str) -> str:
        return with_extras.run((ROOT / "examples" / name).read_text())

    return output


def numbers(label: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{label} ([\d.]+)", text)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example_says_what_it_needs(script):
    code = script.read_text()
    imported = modules(code)
    assert imported <= LIBRARY | NEEDS.keys()
    head = ast.get_docstring(ast.parse(code))
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
    assert all(f'"{script.name}"' in source for script in [*SCRIPTS, NOTEBOOK])


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_installs_what_it_imports_and_keeps_no_output(notebook):
    install, *others = code_cells(notebook)
    assert install.metadata.tags == ["install"]
    imported = set().union(*(modules(cell.source) for cell in others))
    assert {"optax_tricks", "flax"} <= imported <= LIBRARY | NOTEBOOK_NEEDS.keys()
    for name in imported - LIBRARY:
        assert NOTEBOOK_NEEDS[name] in install.source
    assert not any(cell.outputs or cell.execution_count for cell in (install, *others))


@pytest.mark.slow
def test_notebook_compares_all_techniques(notebook, with_extras, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(with_extras.wheel))  # before the checkout
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook.cells.remove(code_cells(notebook)[0])  # pip
    notebook.cells.append(nbformat.v4.new_code_cell("print(optax_tricks.__file__)"))
    NotebookClient(notebook).execute(cwd=tmp_path)
    *_, table, plot, place = code_cells(notebook)
    assert place.outputs[0].text.startswith(str(with_extras.wheel))
    assert "image/png" in plot.outputs[0].data
    lines = table.outputs[0].text.splitlines()[3:]
    number = r"[+-]\d+\.\d+"  # neither nan nor inf
    row = rf"(\S.*?)  +(\S.*?)  +[\d.]+ +{number}  \[{number}, {number}\]"
    found = [re.fullmatch(row, line) for line in lines]
    assert [match and match.groups() for match in found] == COMPARED
