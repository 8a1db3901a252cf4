"""Entries of the catalogue, from which networks are listed, built and documented."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from models._network import Network

Task = Literal["classification", "segmentation", "translation"]

# Options that `models.create` passes to `Layers` and not to the class of the network.
PRECISION = ("dtype", "param_dtype")
CONVOLUTION = ("norm", "weight_standardization", *PRECISION)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One network of the catalogue.

    Attributes:
      name: the name that `models.create` takes.
      task: the task that the network is for.
      description: one line.
      paper: authors, year and link.
      input_shape: (height, width, channels) of the published form.
      published: options of the published form, such as the number of classes.
      num_parameters: number of trainable parameters of the published form.
      options: names of all options of `models.create` for this network.
      build: builds the network from `layers` and the options of its class.
    """

    name: str
    task: Task
    description: str
    paper: str
    input_shape: tuple[int, int, int]
    published: Mapping[str, Any]
    num_parameters: int
    options: tuple[str, ...]
    build: Callable[..., Network]


def classifier(
    name: str,
    description: str,
    paper: str,
    num_parameters: int,
    build: Callable[..., Network],
    *,
    options: tuple[str, ...],
    small_images: bool,
) -> Entry:
    """Returns the entry of a classifier in its CIFAR-10 or its ImageNet form.

    Args:
      name: as in `Entry`.
      description: as in `Entry`.
      paper: as in `Entry`.
      num_parameters: as in `Entry`.
      build: as in `Entry`.
      options: as in `Entry`.
      small_images: whether the published form is for CIFAR-10 (10 classes of 32x32
        images) and not for ImageNet (1000 classes of 224x224 images).
    """
    return Entry(
        name=name,
        task="classification",
        description=description,
        paper=paper,
        input_shape=(32, 32, 3) if small_images else (224, 224, 3),
        published={"num_classes": 10 if small_images else 1000},
        num_parameters=num_parameters,
        options=options,
        build=build,
    )


def form(*, small_images: bool) -> str:
    """Returns how descriptions call a form of a classifier."""
    return "in CIFAR form" if small_images else "in ImageNet form"
