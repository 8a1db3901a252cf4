"""Strict settings for the whole suite, made before jax starts its backend."""

from collections.abc import Iterator

import jax
import pytest

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
    from jax.sharding import AxisType

    from train import run

    def make_mesh(seeds: int = 1) -> jax.sharding.Mesh:
        assert seeds == 1
        axes = (AxisType.Auto,) * 2
        devices = jax.devices()[:1]
        return jax.make_mesh((1, 1), ("seed", "data"), axes, devices=devices)

    monkeypatch.setattr(run, "make_mesh", make_mesh)
