"""The description of a network by which it is listed, built, tested and documented."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import nnx

Task = Literal["classification", "segmentation", "translation"]

# Options that `models.create` hands to the layers of a network, not to its class.
PRECISION = ("dtype", "param_dtype")
CONVOLUTION = ("norm", "weight_standardization", *PRECISION)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One network of the catalogue.

    Attributes:
      name: the name given to `models.create`.
      task: what it is for.
      description: one line.
      paper: authors, year and link.
      input_shape: (height, width, channels) of the published form.
      published: the options of the published form, such as the number of classes.
      num_parameters: trainable parameters of the published form.
      options: names of all that `models.create` takes for it besides `rngs`.
      build: makes the network from `layers` and the options that are its own.
    """

    name: str
    task: Task
    description: str
    paper: str
    input_shape: tuple[int, int, int]
    published: Mapping[str, Any]
    num_parameters: int
    options: tuple[str, ...]
    build: Callable[..., nnx.Module]
