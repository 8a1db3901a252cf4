"""Devices: the mesh, and how arrays are sharded over it.

All devices form one mesh with the axis "data", along which batches are sharded; other
arrays are replicated on every device. Computations are written for whole batches, so
losses, gradients and BatchNorm statistics are computed over the whole batch, no matter
how many devices share it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.errors import UsageError, see

Tree = Any

# Smaller arrays are not worth the communication.
_SMALLEST_SHARDED = 1 << 12


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns devices along "data"; all devices of all processes if unset."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device has whole."""
    return NamedSharding(mesh, P())


def put(tree: Tree, shardings: Tree) -> Tree:
    """Puts arrays that every process has on the devices of all processes.

    Args:
      tree: arrays, which may be PRNG keys.
      shardings: one sharding for all arrays, or a tree of them.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def state_shardings(state: Tree, mesh: Mesh, *, shard_params: bool) -> Tree:
    """Returns the sharding of each array of a training state.

    Args:
      state: arrays or their shapes.
      mesh: the devices.
      shard_params: whether large arrays are sharded along "data", on their longest axis
        that the number of devices divides; otherwise all are replicated.
    """
    size = mesh.shape["data"]

    def sharding(x: Any) -> NamedSharding:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        axes: list[str | None] = [None] * x.ndim
        is_large = np.prod(x.shape, dtype=np.int64) >= _SMALLEST_SHARDED
        if shard_params and is_large and not is_key:
            divisible = [i for i, side in enumerate(x.shape) if side % size == 0]
            if divisible:
                axes[max(divisible, key=lambda i: (x.shape[i], i))] = "data"
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding, state)


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Checks that all processes of a run have the same settings.

    Args:
      settings: JSON values by name, which may be nested.

    Raises:
      UsageError: if they differ; the message names the settings.
    """
    if jax.process_count() == 1:
        return
    mine = dict(_leaves(settings))
    versions = _gathered([",".join(mine)])
    if (versions != versions[0]).any():
        raise UsageError("the processes run different versions of this program")
    values = _gathered(list(mine.values()))
    differ = (values != values[0]).any(axis=(0, 2))
    if differ.any():
        names = [name for name, other in zip(mine, differ, strict=True) if other]
        raise UsageError(
            f"the processes have different settings: {', '.join(names)}; start all "
            "with the same command, but for process_id"
            + see("machines.md#one-run-on-all-of-them")
        )


def _gathered(texts: list[str]) -> np.ndarray:
    """Returns the digest of each text in each process, (processes, texts, bytes)."""
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    mine = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    return np.asarray(multihost_utils.process_allgather(mine))


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name in sorted(settings):
        value = settings[name]
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)
