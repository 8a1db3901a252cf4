"""What tests of several folders use."""

import contextlib
import resource
from collections.abc import Iterator

import jax
from jax.sharding import AxisType, Mesh


def one_device_mesh() -> Mesh:
    """The first device alone, in the form of `train.parallel.make_mesh`."""
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((1, 1), ("seed", "data"), axes, devices=jax.devices()[:1])


@contextlib.contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond a size: the error of a full disk but for its name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
