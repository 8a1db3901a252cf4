"""Flax NNX networks of the papers, made by name.

>>> import models
>>> from flax import nnx
>>> models.names("resnet*")[:2]
('resnet8', 'resnet20')
>>> model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), in_channels=1)
>>> import jax.numpy as jnp
>>> model(jnp.zeros((2, 8, 8, 1))).shape
(2, 10)
"""

import fnmatch
from typing import Any

from flax import nnx

from models import cifar_resnet
from models._entry import Entry

_ENTRIES = {entry.name: entry for entry in cifar_resnet.ENTRIES}

__all__ = ["Entry", "create", "describe", "names"]


def names(pattern: str = "*") -> tuple[str, ...]:
    """Names of all networks that match a shell pattern, smallest first by family."""
    return tuple(fnmatch.filter(_ENTRIES, pattern))


def describe(name: str) -> Entry:
    """What is known about a network.

    >>> import models
    >>> models.describe("resnet20").num_parameters
    269722

    Raises:
      ValueError: if there is no such network; the message lists those there are.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def create(
    name: str, *, num_classes: int, rngs: nnx.Rngs, **options: Any
) -> nnx.Module:
    """Builds a network with fresh parameters.

    Args:
      name: one of `names()`.
      num_classes: number of output logits.
      rngs: where the parameters' keys come from.
      **options: what the network's class takes besides.

    Returns:
      A module from float images (batch, height, width, channels) to logits
      (batch, num_classes).

    Raises:
      ValueError: if there is no such network.
    """
    return describe(name).build(num_classes=num_classes, rngs=rngs, **options)
