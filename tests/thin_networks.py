"""Networks of a layer or two, in place of those that tasks train if none is named.

They are compiled in a fraction of the time, and have the options, the form and the
names of arrays that the others have.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
from flax import nnx

import models
from models import _catalogue
from models.pix2pix import Discriminator, Generator
from models.resnet import ResNet


class Segmenter(models.Network):
    """A convolution with a normalization, and a head."""

    def __init__(self, *, num_classes, layers, in_channels=3):
        self.conv = layers.conv(in_channels, 4, 3)
        self.norm = layers.normalize(4)
        self.head = layers.precise().conv(4, num_classes, 1, use_bias=True)

    def __call__(self, images):
        return self.head(nnx.relu(self.norm(self.conv(images))))


_THIN = {
    "resnet8": partial(ResNet, (1,), stem=3, width=16, padded_shortcut=True),
    "unet_small": Segmenter,
    "unet64_small": partial(Generator, 2, width=4),
    "patchgan16": partial(Discriminator, (4, 8), (2, 1, 1), 4, last_bias=True),
}


@contextlib.contextmanager
def thin_networks() -> Iterator[None]:
    """Makes the networks of the catalogue thin."""
    with pytest.MonkeyPatch.context() as patch:
        for name, build in _THIN.items():
            entry = dataclasses.replace(models.describe(name), build=build)
            patch.setitem(_catalogue._ENTRIES, name, entry)
        yield
