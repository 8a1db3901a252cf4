"""The boxes that `random_resized_crop` cuts from images, on the host or the device."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

SCALE = (0.08, 1.0)
"""Least and largest share of the image's area, unless told otherwise."""
RATIO = (3 / 4, 4 / 3)
"""Least and largest width / height of a box, unless told otherwise."""


def draw_sides(
    uniform: Callable[[Any, Any], Any],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    xp: ModuleType,
) -> tuple[Any, Any]:
    """Draws the sides of boxes of random area and shape that fit in an image.

    The area is uniform, and the ratio of width to height is log-uniform among those at
    which a box of this area fits.

    >>> import numpy as np
    >>> def middle(low, high):
    ...     return (low + high) / 2
    >>> [side.item() for side in draw_sides(middle, 8, 8, (0.25, 0.25), (1, 1), np)]
    [4.0, 4.0]

    Args:
      uniform: draws a number, or an array of them, between two bounds.
      height: height of the image in pixels.
      width: width of the image in pixels.
      scale: least and largest share of the image's area.
      ratio: least and largest width / height; where no box in this range has the area
        drawn, the nearest ratio that fits is taken.
      xp: `numpy` or `jax.numpy`.

    Returns:
      Height and width of the boxes in pixels, which need not be whole.
    """
    area = uniform(*scale) * height * width
    # A box of this area fits between these ratios.
    least, most = area / height**2, width**2 / area
    low, high = (xp.log(xp.clip(r, least, most)) for r in ratio)
    shape = xp.exp(uniform(low, high))
    return xp.sqrt(area / shape), xp.sqrt(area * shape)
