"""Fixtures of tests and doctests: the folder of datasets, and compiled programs."""

import ctypes
import gc
import os
from collections.abc import Iterator

import jax
import psutil
import pytest

# Tests compile far more than they run; LLVM's optimizations take most of the time. JAX
# reads this when it starts its backend, and so do the processes that tests start.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# PyTorch is not in the environment of development, and there are no examples.
collect_ignore = ["benchmarks/pytorch"]

# A test process stays below 3 GB.
_MEMORY_STEP = 1 << 29


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    # The processes of pytest-xdist share one folder; preparing is safe among them.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # Never the user's own folder.
    os.environ["TFDS_DATA_DIR"] = str(shared / "tensorflow_datasets")
    # Many tests run the same commands, and some in other processes, which read this.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def _memory_limit() -> list[int]:
    return [2 * _MEMORY_STEP]


@pytest.fixture(autouse=True)
def _bounded_memory(_memory_limit: list[int]) -> Iterator[None]:
    """Forgets compiled programs when they fill the memory of the process."""
    yield
    process = psutil.Process()
    if process.memory_info().rss > _memory_limit[0]:
        jax.clear_caches()
        gc.collect()
        # glibc keeps what is free for itself.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        # Some memory is not given back: the next time it must have grown again.
        _memory_limit[0] = process.memory_info().rss + _MEMORY_STEP
