"""Helpers for tests in several folders."""

import contextlib
import re
import resource
import socket
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from rich.console import Console, RenderableType


def one_device_mesh() -> Mesh:
    """Returns the first device alone, in the form of `train.parallel.make_mesh`."""
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), axis_types, devices=jax.devices()[:1])


@contextlib.contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Limits the size of files, which raises an error like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def printed_lines(renderable: RenderableType, *, width: int) -> list[str]:
    """Returns what a terminal of some width shows."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


def squeezed(text: str) -> str:
    """Returns a text without white space and frames; tyro breaks lines anywhere."""
    return re.sub(r"[\s│]", "", text)


def free_port() -> int:
    """Returns a port that no program on this machine listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def mean_of(loss):
    """Returns the mean of a loss, which is a pair (sum, count)."""
    total, count = loss
    return total / jnp.maximum(count, 1e-12)
