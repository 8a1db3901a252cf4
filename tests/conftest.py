"""Strict settings for the whole suite, made before jax starts its backend."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

pytest.register_assert_rewrite("tests.optax_tricks.table")

# Sharding tests need several devices; simulated ones do on any machine.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the library, built from this checkout."""
    root = Path(__file__).parents[1]
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


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
