"""The real archives, and datasets prepared from them once for all tests."""

import os
from pathlib import Path

import pytest

from train import data

ROOT = Path(__file__).resolve().parents[3]
ARCHIVES = {
    "image_folder/cifar10": "cifar10.tar.xz",
    "fashion_mnist_idx": "fashion_mnist.tar",
    "camvid": "camvid.tar",
    "paired_images/maps": "maps.tar",
}


@pytest.fixture(scope="session")
def archives():
    """The folder of the real archives, described in its README.md."""
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("OPTAX_TRICKS_DATA") or default)
    if not all((folder / name).exists() for name in ARCHIVES.values()):
        pytest.skip(f"no real archives in {folder}; set OPTAX_TRICKS_DATA to theirs")
    return folder


@pytest.fixture(scope="session")
def real(archives, tmp_path_factory):
    """The folder of datasets, once the one that is asked for is prepared there."""
    # One for all of pytest-xdist's processes: preparing is safe among them.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def prepared(name):
        data_dir = shared / "real"
        data.prepare(name, source=archives / ARCHIVES[name], data_dir=data_dir)
        return data_dir

    return prepared
