"""Where arrays lie: on one device or many, of one process or several.

All devices form one mesh with two axes. Batches are cut along "data", runs from
several seeds along "seed"; what is not cut is on every device. Computations are
written for whole batches, so that losses, gradients and BatchNorm statistics are those
of the whole batch however many devices share it.
"""

import os
from typing import Any

import jax
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
    process this is; otherwise all three arguments do. JAX ends the process with a
    message of its own if others are not there within five minutes, or die later.

    Raises:
      UsageError: if only some of the arguments are given, or JAX refuses them.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UsageError(
                "--coordinator HOST:PORT, --num-processes and --process-id belong "
                "together: give all three, or none under SLURM, Open MPI or on a TPU"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    elif not _launched_with_others():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {error}") from error


def _launched_with_others() -> bool:
    # Not SLURM_NTASKS, which a command that srun has not started sees too.
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name) or 1) > 1 for name in sizes):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def make_mesh(seeds: int = 1) -> Mesh:
    """All devices, `seeds` of them side by side along "seed", the rest along "data".

    Raises:
      UsageError: if the devices cannot be divided so.
    """
    count = jax.device_count()
    if count % seeds:
        raise UsageError(f"{count} devices cannot be shared evenly by {seeds} seeds")
    return jax.make_mesh(
        (seeds, count // seeds), ("seed", "data"), axis_types=(AxisType.Auto,) * 2
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole."""
    return NamedSharding(mesh, P())


def put(tree: Tree, shardings: Tree) -> Tree:
    """Puts arrays that every process has whole on devices, which may be of others.

    Args:
      tree: arrays, PRNG keys among them.
      shardings: one for all, or a tree of them.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def state_shardings(
    state: Tree, mesh: Mesh, *, stacked: bool, shard_parameters: bool
) -> Tree:
    """Where each array of a training state lies.

    Args:
      state: arrays or their shapes.
      mesh: the devices.
      stacked: whether the first axis of every array is that of the seeds.
      shard_parameters: whether larger arrays are cut along "data", at the longest axis
        that the devices divide.
    """
    first = ("seed",) if stacked else ()
    size = mesh.shape["data"]

    def sharding(x: Any) -> NamedSharding:
        shape = x.shape[len(first) :]
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        axes: list[str | None] = [None] * len(shape)
        large = np.prod(shape, dtype=np.int64) >= _SMALLEST_SHARDED
        if shard_parameters and large and not is_key:
            divided = [i for i, side in enumerate(shape) if side % size == 0]
            if divided:
                axes[max(divided, key=lambda i: (shape[i], i))] = "data"
        return NamedSharding(mesh, P(*first, *axes))

    return jax.tree.map(sharding, state)
