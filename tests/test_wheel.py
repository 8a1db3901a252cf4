"""The README's examples run as they stand, with what `pip install` brings and no more.

The environments of these tests hold the built wheel and the packages that it requires,
with and without the extra. The checkout is not on their path.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPENING, LIBRARY, NNX = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# -I and -S leave out the current folder, PYTHONPATH, site-packages and its .pth files,
# one of which puts the checkout on the path.
PYTHON = [sys.executable, "-I", "-S", "-W", "error", "-c"]
PRELUDE = """
import sys
sys.path[:0] = {paths}
import importlib.util
for name in ("models", "train", "benchmarks", "tests"):
    assert importlib.util.find_spec(name) is None, name
import optax_tricks
assert optax_tricks.__file__.startswith({wheel!r}), optax_tricks.__file__
"""


def requirements(dist: Distribution, extras: Iterable[str]) -> Iterator[Requirement]:
    """Yields what a distribution with some extras requires directly."""
    for requirement in map(Requirement, dist.requires or ()):
        marker = requirement.marker
        if not marker or any(marker.evaluate({"extra": x}) for x in ("", *extras)):
            yield requirement


def all_required(dist: Distribution, extras: Iterable[str]) -> list[Distribution]:
    """Returns the installed distributions that a distribution brings along."""
    found, todo = {}, list(requirements(dist, extras))
    while todo:
        wanted = todo.pop()
        key = wanted.name, frozenset(wanted.extras)
        if key not in found:
            found[key] = distribution(wanted.name)
            todo += requirements(found[key], wanted.extras)
    return list(found.values())


class Environment:
    """A folder with the installed wheel, and links to the packages that it requires."""

    def __init__(self, folder: Path, wheel: Path, extras: Iterable[str] = ()):
        self.wheel, self.packages = folder / "wheel", folder / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
        target = ["--no-deps", "--target", self.wheel, wheel]
        subprocess.run([*pip, *target], check=True, cwd=folder)
        self.packages.mkdir()
        (own,) = distributions(path=[str(self.wheel)])
        for dist in all_required(own, extras):
            for top in {file.parts[0] for file in dist.files or ()} - {".."}:
                link = self.packages / top
                if not link.exists() and not top.endswith(".pth"):
                    link.symlink_to(Path(dist.locate_file(top)))

    def run(self, code: str) -> subprocess.CompletedProcess:
        paths = [str(self.wheel), str(self.packages)]
        prelude = PRELUDE.format(paths=paths, wheel=str(self.wheel))
        return subprocess.run(
            [*PYTHON, prelude + code],
            cwd=self.packages,
            env={"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory, wheel):
    """What `pip install optax_tricks` brings."""
    return Environment(tmp_path_factory.mktemp("plain"), wheel)


@pytest.fixture(scope="module")
def with_nnx(tmp_path_factory, wheel):
    """What `pip install 'optax_tricks[nnx]'` brings."""
    return Environment(tmp_path_factory.mktemp("nnx"), wheel, ["nnx"])


def succeeds(result: subprocess.CompletedProcess) -> list[float]:
    """Returns the numbers that a process printed."""
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


def test_opening_runs(plain):
    succeeds(plain.run("import optax\n" + OPENING))


def test_example_of_the_library_runs(plain):
    loss, factor = succeeds(plain.run(LIBRARY))
    assert loss < 0.7  # it was 1 at the start
    assert 0 <= factor < 1


def test_example_of_nnx_runs(with_nnx):
    loss, accuracy = succeeds(with_nnx.run(NNX))
    assert loss < 0.5  # it was about log(3) at the start
    assert accuracy > 0.9


def test_the_library_alone_does_not_import_flax(with_nnx):
    code = "print(int('flax' in sys.modules)); import flax"
    assert succeeds(with_nnx.run(code)) == [0]


def test_nnx_without_flax_says_what_to_install(plain):
    result = plain.run("import optax_tricks.nnx")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: optax_tricks.nnx needs Flax")
    assert "pip install 'optax_tricks[nnx]'" in message
