"""Memory of the host that is kept for the next step."""

import ctypes

import jax

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_BYTES = 2**31 - 1  # what is kept at most at the end of the heap


def keep_freed_memory() -> None:
    """Lets steps on CPUs use the memory of the step before.

    XLA allocates the temporary arrays of each step anew. If they are large, glibc gets
    them from the system and returns them at the end of the step, and the system fills
    them with zeros, which can take a fifth of the time of a step. This has glibc keep
    them. As only the main thread allocates from a heap of any size, CPUs also run
    programs in the thread that calls them.

    To be called before JAX has made its devices. Where the C library is not glibc, only
    the thread changes.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; on Windows, no library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _BYTES)
