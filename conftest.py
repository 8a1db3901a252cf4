"""What tests and doctests share: where datasets are prepared, and compiled programs."""

import os

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory):
    # One for all of pytest-xdist's processes: preparing is safe among them.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # Never in the user's own folder.
    os.environ["TFDS_DATA_DIR"] = str(shared / "tensorflow_datasets")
    # Many tests run the same commands; those in processes of their own read this.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
