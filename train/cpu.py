"""How JAX uses CPUs: the memory of a step, and what computes convolutions."""

import ctypes
import os
import platform
from importlib import metadata

import jax

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_BYTES = 2**31 - 1  # what is kept at most at the end of the heap

_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
# Versions of jaxlib that have this flag. Others may end the process for it.
_HAVE_FUSIONS = ((0, 10), (0, 12))


def set_up_cpu() -> None:
    """Lets steps on CPUs run as fast as they can.

    XLA allocates the temporary arrays of each step anew. If they are large, glibc gets
    them from the system and returns them at the end of the step, and the system fills
    them with zeros, which can take a fifth of the time of a step. This has glibc keep
    them. As only the main thread allocates from a heap of any size, CPUs also run
    programs in the thread that calls them. Where the C library is not glibc, only the
    thread changes.

    On x86-64, XLA computes convolutions by YNNPACK. Eigen, which XLA used before, is up
    to twice as fast. This adds a flag to the environment variable `XLA_FLAGS` that has
    XLA use it again, unless the variable has that flag already.

    To be called before JAX has made its devices.
    """
    _keep_freed_memory()
    _convolve_by_eigen()


def _keep_freed_memory() -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; on Windows, no library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _BYTES)


def _convolve_by_eigen() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    version = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    oldest, newest = _HAVE_FUSIONS
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and oldest <= version <= newest and _FUSIONS not in flags:
        added = f"{_FUSIONS}=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flags} {added}".strip()
