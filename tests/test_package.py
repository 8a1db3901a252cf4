"""What is shipped, and what the library and the networks import."""

import re
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import optax_tricks
from tests.wheel_environment import imports

ROOT = Path(__file__).parents[1]
# Imports between our own packages are the contracts of import-linter.
MAY_IMPORT = {
    "optax_tricks": {"jax", "optax"},
    "models": {"jax", "flax", "jaxtyping", "safetensors"},
}


@pytest.fixture(scope="module")
def archive(wheel):
    with zipfile.ZipFile(wheel) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(archive):
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_library_alone(archive):
    names = set(archive.namelist())
    sources = {f"optax_tricks/{p.name}" for p in (ROOT / "optax_tricks").glob("*.py")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == sources | {"optax_tricks/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_needs_jax_and_optax_and_flax_as_the_only_extra(metadata):
    requirements = metadata.get_all("Requires-Dist")
    names = {re.split(r"[>=<\[; ]", line)[0]: line for line in requirements}
    assert names.keys() == {"jax", "optax", "flax"}
    assert metadata.get_all("Provides-Extra") == ["nnx"]
    assert [name for name, line in names.items() if "extra ==" in line] == ["flax"]


def test_version_is_the_same_everywhere(metadata):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata["Version"] == citation["version"] == optax_tricks.__version__


def test_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    for entry in (citation, *citation["references"]):
        assert entry["title"]
        assert entry["authors"]
    # The four papers are those that the README links.
    cited = {reference["url"] for reference in citation["references"]}
    readme = (ROOT / "README.md").read_text()
    assert cited == set(re.findall(r"https://arxiv\.org/abs/[\d.]+", readme))


def test_lower_bounds_of_flax_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (bound,) = project["project"]["optional-dependencies"]["nnx"]
    assert bound in project["dependency-groups"]["train"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_few_others(package):
    for path in (ROOT / package).rglob("*.py"):
        allowed = MAY_IMPORT[package] | {package} | sys.stdlib_module_names
        if path == ROOT / "optax_tricks" / "nnx.py":
            allowed |= {"flax"}
        assert imports(path.read_text()) <= allowed, path
