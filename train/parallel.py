"""Devices and processes: the mesh, and how arrays are sharded over it.

All devices form one mesh with the axis "data", along which batches are sharded; other
arrays are replicated on every device. Computations are written for whole batches, so
losses, gradients and BatchNorm statistics are computed over the whole batch, no matter
how many devices share it.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.errors import UsageError

Tree = Any

# Smaller arrays are not worth the communication.
_SMALLEST_SHARDED = 1 << 12


def start_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of a run, if there are several.

    Launchers that JAX knows (SLURM, Open MPI, TPU pods) say in the environment which
    process this is. Without one, all three arguments are needed. JAX ends the process
    with its own message if others do not join within five minutes, or die later.

    Args:
      coordinator: "HOST:PORT" of the first process.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      UsageError: if only some of the arguments are given, or JAX refuses them.
    """
    if coordinator is None and num_processes is None and process_id is None:
        if not _launched_with_others():
            return
    else:
        if coordinator is None or num_processes is None or process_id is None:
            raise UsageError(
                "coordinator, num_processes and process_id belong together: give all "
                "three, or none under SLURM, Open MPI or on a TPU"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {error}") from error


def _launched_with_others() -> bool:
    # Not SLURM_NTASKS: commands that srun has not started see it too.
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name) or 1) > 1 for name in sizes):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def make_mesh() -> Mesh:
    """Returns all devices, of all processes, along "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


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
