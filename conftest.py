"""Where tests and doctests prepare datasets: never in the user's own folder."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _data_dir(tmp_path_factory):
    # One for all of pytest-xdist's processes: preparing is safe among them.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["TFDS_DATA_DIR"] = str(shared / "tensorflow_datasets")
