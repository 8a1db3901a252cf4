"""Fixtures of tests and doctests: the folder of datasets, and compiled programs."""

import os
from collections.abc import Iterator

import jax
import psutil
import pytest

# Two processes test at once, and a machine may have 8 GB.
_MOST_MEMORY = 1 << 30


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


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Forgets compiled programs when they fill the memory of the process."""
    yield
    if psutil.Process().memory_info().rss > _MOST_MEMORY:
        jax.clear_caches()
