"""Strict settings for the whole suite, made before jax starts its backend."""

from collections.abc import Iterator

import jax
import pytest

pytest.register_assert_rewrite("tests.optax_tricks.table")

# Sharding tests need several devices; simulated ones do on any machine.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, for comparisons with NumPy float64 references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has commands run on one of the devices, as on most machines without a GPU."""
    from tests.shared import one_device_mesh
    from train import run

    monkeypatch.setattr(run, "make_mesh", one_device_mesh)
