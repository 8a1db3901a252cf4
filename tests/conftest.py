"""Strict settings for the whole suite, made before jax starts its backend."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.wheel_environment import Environment

pytest.register_assert_rewrite("tests.optax_tricks.table")

# Sharding tests need several devices; simulated ones do on any machine.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Tables of faults and unusual inputs, which `pytest -m faults` runs.
FAULTS = (
    "models/test_weights.py",
    "optax_tricks/test_non_finite.py",
    "optax_tricks/test_validation.py",
    "train/data/test_archives.py",
    "train/data/test_folders.py",
    "train/data/test_images.py",
    "train/data/test_interruption.py",
    "train/data/test_read_back.py",
    "train/output/test_checkpoints.py",
    "train/output/test_run_folder.py",
    "train/test_command_line.py",
    "train/test_distributed.py",
    "train/test_json.py",
    "train/test_processes.py",
    "train/test_reliability.py",
    "train/test_signals.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of faults."""
    for item in items:
        if item.path.as_posix().endswith(tuple(f"tests/{name}" for name in FAULTS)):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the library, built from this checkout."""
    root = Path(__file__).parents[1]
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def with_extras(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """What `pip install 'optax_tricks[nnx]'` brings, and what examples need too."""
    folder = tmp_path_factory.mktemp("with_extras")
    others = ("equinox", "matplotlib", "scikit-learn", "scipy")
    return Environment(folder, wheel, ["nnx"], others)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, for comparisons with NumPy float64 references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs commands on one of the devices, as on most machines without a GPU."""
    from tests.shared import one_device_mesh
    from train import program

    monkeypatch.setattr(program, "make_mesh", one_device_mesh)


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    """Makes the networks that tasks train by default thin."""
    from tests.thin_networks import thin_networks

    with thin_networks():
        yield
