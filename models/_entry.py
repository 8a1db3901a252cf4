"""The description of a network by which it is listed, built and tested."""

import dataclasses
from collections.abc import Callable

from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One network of the catalogue.

    Attributes:
      name: the name given to `models.create`.
      description: one line.
      paper: authors, year and link.
      input_shape: (height, width, channels) of the published form.
      num_parameters: trainable parameters of the published form.
      num_classes: classes of the published form.
      build: makes the network from `num_classes`, `rngs` and options.
    """

    name: str
    description: str
    paper: str
    input_shape: tuple[int, int, int]
    num_parameters: int
    num_classes: int
    build: Callable[..., nnx.Module]
