"""Datasets that are prepared once from real files, then read without TensorFlow.

>>> from train import data
>>> digits = data.load("digits")
>>> len(digits.split("train")), digits.num_classes
(1000, 10)
>>> batch = digits.split("test").read([0, 1, 2])
>>> batch["image"].shape, batch["label"].shape
((3, 8, 8, 1), (3,))

Importing this module registers its builders with TFDS, so that `tfds.builder("camvid")`
finds them.
"""

from train.data.dataset import Dataset, Split
from train.data.preparation.builders import BUILDERS
from train.data.preparation.catalogue import (
    default_data_dir,
    folder_of,
    prepare,
    prepared,
)
from train.data.preparation.prepared import Prepared, load, open_prepared

__all__ = [
    "BUILDERS",
    "Dataset",
    "Prepared",
    "Split",
    "default_data_dir",
    "folder_of",
    "load",
    "open_prepared",
    "prepare",
    "prepared",
]
