"""Flax NNX networks of the papers, created by name.

>>> import models
>>> from flax import nnx
>>> models.names("resnet*")[:2]
('resnet8', 'resnet20')
>>> model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), in_channels=1)
>>> import jax.numpy as jnp
>>> model(jnp.zeros((2, 8, 8, 1))).shape
(2, 10)
"""

from models._catalogue import create, describe, names
from models._entry import Entry
from models._layers import ImageShapeError, Layers
from models._network import Network
from models._weights import load_weights, save_weights

__all__ = [
    "Entry",
    "ImageShapeError",
    "Layers",
    "Network",
    "create",
    "describe",
    "load_weights",
    "names",
    "save_weights",
]
