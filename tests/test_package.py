"""What is shipped, and who imports whom."""

import ast
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("optax_tricks", "models", "train", "benchmarks")
MAY_IMPORT = {
    "optax_tricks": set(),
    "models": set(),
    "train": {"optax_tricks", "models"},
    "benchmarks": {"optax_tricks", "models", "train"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_library_alone(wheel):
    names = set(wheel.namelist())
    sources = {f"optax_tricks/{p.name}" for p in (ROOT / "optax_tricks").glob("*.py")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == sources | {"optax_tricks/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_needs_jax_and_optax_alone(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    requirements = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist")
    always = [line for line in requirements if "extra ==" not in line]
    assert [line.split(">")[0] for line in always] == ["jax", "optax"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward_only(room):
    files = list((ROOT / room).rglob("*.py"))
    found = {name for path in files for name in imports(path)}
    assert found & set(ROOMS) <= MAY_IMPORT[room] | {room}
    others = found - set(ROOMS) - sys.stdlib_module_names
    if room == "optax_tricks":
        assert others <= {"jax", "optax"}
    if room == "models":
        assert others <= {"jax", "flax", "safetensors"}
