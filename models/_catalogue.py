"""The catalogue of networks: their names, entries and how they are created."""

import difflib
import fnmatch
import numbers
from typing import Any

from flax import nnx

from models import (
    densenet,
    duc_hdc,
    mobilenet,
    pix2pix,
    preact_resnet,
    pspnet,
    resnet,
    unet,
    upanet,
    vgg,
    vision_transformer,
)
from models._entry import Entry, Task
from models._layers import Layers
from models._network import Network

_FAMILIES = (
    resnet,
    preact_resnet,
    vgg,
    densenet,
    mobilenet,
    upanet,
    vision_transformer,
    pspnet,
    duc_hdc,
    unet,
    pix2pix,
)
_ENTRIES: dict[str, Entry] = {
    entry.name: entry for family in _FAMILIES for entry in family.ENTRIES
}
_LAYER_OPTIONS = tuple(Layers.__dataclass_fields__)

# Options that count something.
_COUNTS = ("num_classes", "in_channels", "out_channels", "image_size", "patch_size")


def names(pattern: str = "*", *, task: Task | None = None) -> tuple[str, ...]:
    """Returns the names of the networks that match a shell pattern.

    Families follow each other, each with its smallest networks first.

    >>> import models
    >>> models.names("resnet*_cifar")[0]
    'resnet18_cifar'
    >>> models.names(task="translation")[0]
    'unet256'

    Args:
      pattern: a pattern as for file names, with `*`, `?` and `[...]`.
      task: if given, only networks for this task are returned.
    """
    found = fnmatch.filter(_ENTRIES, pattern)
    return tuple(name for name in found if task in (None, _ENTRIES[name].task))


def describe(name: str) -> Entry:
    """Returns the catalogue entry of a network.

    >>> import models
    >>> models.describe("resnet20").num_parameters
    269722

    Raises:
      ValueError: if there is no such network. The message names similar ones.
    """
    if name not in _ENTRIES:
        similar = difflib.get_close_matches(name.lower(), _ENTRIES)
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise ValueError(f"unknown model {name!r}; {hint}known: {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def create(name: str, *, rngs: nnx.Rngs, **options: Any) -> Network:
    """Creates a network with new parameters.

    >>> import jax.numpy as jnp, models
    >>> from flax import nnx
    >>> model = models.create(
    ...     "resnet8", num_classes=100, rngs=nnx.Rngs(0), norm="group",
    ...     dtype=jnp.bfloat16)
    >>> model(jnp.zeros((1, 32, 32, 3))).shape
    (1, 100)

    Args:
      name: one of `names()`.
      rngs: the source of keys for parameters and dropout.
      **options: any of `describe(name).options`. `num_classes` is required for
        classification and segmentation. The other options are those of the network's
        class and of `Layers`.

    Returns:
      A network that maps float images (batch, height, width, channels) to logits
      (batch, num_classes), to logits of every pixel (batch, height, width,
      num_classes), or to images, by its task. A discriminator returns logits of patches
      (batch, rows, columns, 1).

    Raises:
      ValueError: if there is no such network, if it has no such option, or if an
        option has a value that it does not allow.
    """
    entry = describe(name)
    unknown = ", ".join(sorted(options.keys() - set(entry.options)))
    if unknown:
        raise ValueError(
            f"{name} has no option {unknown}; it takes {', '.join(entry.options)}"
        )
    if "num_classes" in entry.options and "num_classes" not in options:
        raise ValueError(f"{name} needs num_classes, the number of classes")
    for key in _COUNTS:
        if key in options:
            _check_count(key, options[key])
    for_layers = {key: options.pop(key) for key in _LAYER_OPTIONS if key in options}
    return entry.build(layers=Layers(rngs=rngs, **for_layers), **options)


def _check_count(option: str, value: Any) -> None:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < 1:
        square = option in ("image_size", "patch_size")
        hint = ", the height and the width in pixels" if square else ""
        raise ValueError(
            f"{option} must be a whole number of at least 1{hint}; got {value!r}"
        )
