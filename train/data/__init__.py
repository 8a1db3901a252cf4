"""Datasets, loaded by name as arrays that fit on the device.

>>> from train import data
>>> digits = data.load("digits")
>>> digits.train["image"].shape, digits.test["image"].shape, digits.num_classes
((1000, 8, 8, 1), (797, 8, 8, 1), 10)
"""

from train.data import digits
from train.data._dataset import Dataset, Split

_LOADERS = {"digits": digits.load}

__all__ = ["Dataset", "Split", "load", "names"]


def names() -> tuple[str, ...]:
    """Names of all datasets."""
    return tuple(_LOADERS)


def load(name: str) -> Dataset:
    """Loads a dataset.

    Raises:
      ValueError: if there is no such dataset; the message lists those there are.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(_LOADERS)}")
    return _LOADERS[name]()
