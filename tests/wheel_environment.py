"""Environments with the built wheel and chosen packages, without the checkout."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

# The packages of a checkout, which are not in the wheel.
CHECKOUT = {"benchmarks", "models", "tests", "train"}

# -I and -S leave out the current folder, PYTHONPATH, site-packages and its .pth files,
# one of which puts the checkout on the path.
PYTHON = [sys.executable, "-I", "-S", "-W", "error", "-c"]
PRELUDE = """
import sys
sys.path[:0] = {paths}
import importlib.util
for name in {checkout}:
    assert importlib.util.find_spec(name) is None, name
import optax_tricks
assert optax_tricks.__file__.startswith({wheel!r}), optax_tricks.__file__
"""


def imports(code: str) -> set[str]:
    """Returns the top-level names of the modules that some code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def requirements(dist: Distribution, extras: Iterable[str]) -> Iterator[Requirement]:
    """Yields what a distribution with some extras requires directly."""
    for requirement in map(Requirement, dist.requires or ()):
        marker = requirement.marker
        if not marker or any(marker.evaluate({"extra": x}) for x in ("", *extras)):
            yield requirement


def all_required(todo: Iterable[Requirement]) -> list[Distribution]:
    """Returns the installed distributions that requirements bring along."""
    found, todo = {}, list(todo)
    while todo:
        wanted = todo.pop()
        key = wanted.name, frozenset(wanted.extras)
        if key not in found:
            found[key] = distribution(wanted.name)
            todo += requirements(found[key], wanted.extras)
    return list(found.values())


class Environment:
    """A folder with the installed wheel, and links to the packages that it requires.

    Attributes:
      wheel: the folder of the installed wheel.
    """

    def __init__(
        self,
        folder: Path,
        wheel: Path,
        extras: Iterable[str] = (),
        others: Iterable[str] = (),
    ):
        self.wheel = folder / "wheel"
        self._packages, self._empty = folder / "packages", folder / "empty"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
        target = ["--no-deps", "--target", self.wheel, wheel]
        subprocess.run([*pip, *target], check=True, cwd=folder)
        self._packages.mkdir()
        self._empty.mkdir()
        (own,) = distributions(path=[str(self.wheel)])
        for dist in all_required(
            [*requirements(own, extras), *map(Requirement, others)]
        ):
            for top in {file.parts[0] for file in dist.files or ()} - {".."}:
                link = self._packages / top
                if not link.exists() and not top.endswith(".pth"):
                    link.symlink_to(Path(dist.locate_file(top)))

    def run(self, code: str, stdin: str = "") -> str:
        """Returns what some code prints, which must end without an error."""
        result = self.try_to_run(code, stdin)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def try_to_run(self, code: str, stdin: str = "") -> subprocess.CompletedProcess:
        prelude = PRELUDE.format(
            paths=[str(self.wheel), str(self._packages)],
            checkout=sorted(CHECKOUT),
            wheel=str(self.wheel),
        )
        return subprocess.run(
            [*PYTHON, prelude + code],
            cwd=self._empty,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            input=stdin,
            capture_output=True,
            text=True,
        )
