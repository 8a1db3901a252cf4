"""The base class of all networks."""

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType

from flax import nnx
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Logits = Float[Array, "batch classes"]
PixelLogits = Float[Array, "batch height width classes"]
PatchLogits = Float[Array, "batch rows columns 1"]
# What a network returns: any of these, by its task.
Outputs = Float[Array, "batch ..."]


class Network(nnx.Module):
    """The base class of all networks of the catalogue.

    A subclass maps images to its outputs in `__call__` and overrides what differs from
    the defaults below. `load_weights` and `save_weights` take any subclass, also one
    that is not in the catalogue.

    >>> import jax.numpy as jnp, models
    >>> from flax import nnx
    >>> class Linear(models.Network):
    ...     head_paths = ("fc",)
    ...
    ...     def __init__(self, num_classes, rngs):
    ...         self.fc = nnx.Linear(3, num_classes, rngs=rngs)
    ...
    ...     def __call__(self, images):
    ...         return self.fc(images.mean(axis=(1, 2)))
    >>> model = Linear(5, nnx.Rngs(0))
    >>> logits, auxiliary = model.with_auxiliary(jnp.zeros((2, 8, 8, 3)))
    >>> logits.shape, auxiliary
    ((2, 5), None)

    Attributes:
      head_paths: dotted paths of the last layers of a classifier, such as `("fc",)`.
        They depend on the number of classes, so fine-tuning replaces them:
        `load_weights(new_head=True)` skips them. Networks for segmentation and
        translation have none. A backbone names the head that it was built without, so
        that it can skip the head in the file of a classifier.
      backbone: the classifier without a head that the network is built on, which takes
        pretrained ImageNet weights; None if there is none.
      auxiliary_weight: the weight of the loss of the auxiliary logits in training; the
        loss of the logits has weight 1. It is 0 if there are no auxiliary logits.
      other_names: for each other naming of weights, such as "timm", a function from the
        dotted name of an array in this network to its name there.
      other_shapes: for names in other namings, the shape of the array there, if it has
        another one than here.
    """

    head_paths: tuple[str, ...] = ()
    backbone: "Network | None" = None
    auxiliary_weight: float = 0.0
    other_names: Mapping[str, Callable[[str], str]] = MappingProxyType({})
    other_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    @abc.abstractmethod
    def __call__(self, images: Images) -> Outputs:
        """Maps float images to what the network's task asks for.

        Args:
          images: (batch, height, width, channels).

        Returns:
          Logits (batch, classes), logits of every pixel (batch, height, width,
          classes), or images (batch, height, width, channels).

        Raises:
          ImageShapeError: if the network does not take images of this shape.
        """

    def with_auxiliary(self, images: Images) -> tuple[Outputs, Outputs | None]:
        """Maps images to logits and to auxiliary logits for a second loss in training.

        Args:
          images: (batch, height, width, channels).

        Returns:
          The outputs of `__call__`, and auxiliary logits of the same shape, or None if
          the network has none. The training loss is the loss of the former plus
          `auxiliary_weight` times that of the latter.
        """
        return self(images), None
