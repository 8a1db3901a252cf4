"""Composes scenes of several handwritten digits from small images of single digits.

A scene has a photo-like image, the class of every pixel, and a drawing with one color
for each class. So there are photos of real handwriting to segment, and drawings to
translate to images, without a download. Every digit has a random color and texture, so
that only its shape tells its class. The drawing does determine that digits are brighter
than the background, lit from the upper left, and cast a shadow to the lower right.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

CLASS_NAMES = ("background", *"0123456789")
COLORS = (
    (0, 0, 0),
    (230, 40, 40),
    (255, 145, 0),
    (255, 230, 60),
    (125, 205, 40),
    (10, 125, 65),
    (80, 220, 220),
    (40, 90, 235),
    (140, 60, 200),
    (255, 130, 220),
    (150, 95, 50),
)

_INK = 0.5  # a pixel with more ink belongs to the stroke
_VISIBLE = 0.9  # at least this share of every digit stays uncovered
_TRIES = 50  # places to try for a digit before the scene counts as full


class Scene(NamedTuple):
    """One composed example.

    Attributes:
      image: the digits on a textured background, uint8 (size, size, 3).
      mask: the class of each pixel, 0 for background and 1 + d for digit d, uint8
        (size, size).
      drawing: the mask in `COLORS`, uint8 (size, size, 3).
    """

    image: np.ndarray
    mask: np.ndarray
    drawing: np.ndarray


def compose(
    images: np.ndarray, labels: np.ndarray, *, seed: int, index: int, size: int = 64
) -> Scene:
    """Composes one scene of two to five digits.

    Digits take about a quarter to a half of the height of the scene and are rotated by
    at most 15 degrees. They may overlap as long as nine tenths of each stay visible.

    Args:
      images: bright digits on black to choose from, uint8 (n, side, side, 1).
      labels: their classes from 0 to 9, int (n,).
      seed: seed of the dataset.
      index: number of the scene. The same arguments always give the same scene.
      size: height and width of the scene in pixels.

    Returns:
      The scene.

    Examples:
      >>> from sklearn.datasets import load_digits
      >>> digits = load_digits()
      >>> images = np.uint8(digits.images[..., None] * 15)
      >>> scene = compose(images, digits.target, seed=0, index=0)
      >>> scene.image.shape, scene.mask.shape, scene.drawing.shape
      ((64, 64, 3), (64, 64), (64, 64, 3))
    """
    rng = np.random.default_rng([seed, index])
    chosen = rng.integers(len(images), size=rng.integers(2, 6))
    canvas = _surface(rng.uniform(0.2, 0.4), 0.15, size, rng)
    mask = np.zeros((size, size), np.uint8)
    placed = _place(images[chosen], size, rng)  # may lack some
    for ink, label in zip(placed, labels[chosen], strict=False):
        _paint(canvas, ink, _surface(rng.uniform(0.65, 0.8), 0.4, size, rng))
        mask[ink > _INK] = 1 + label
    image = np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)
    return Scene(image, mask, np.array(COLORS, np.uint8)[mask])


def _place(digits: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draws each digit where those before it stay visible, until the scene is full.

    Returns the ink of the digits drawn, from bottom to top.
    """
    placed: list[np.ndarray] = []
    for digit in digits:
        for _ in range(_TRIES):
            ink = _draw(digit[..., 0], size, rng)
            if _all_visible([*placed, ink]):
                placed.append(ink)
                break
        else:
            break  # the scene is full
    return placed


def _draw(digit: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a digit somewhere on an empty canvas: ink in [0, 1], (size, size)."""
    margin = 2  # lets strokes at the border of the image end smoothly
    source = Image.fromarray(np.pad(digit, margin))
    zoom = size * rng.uniform(0.28, 0.5) / len(digit)
    angle = np.deg2rad(rng.uniform(-15, 15))
    reach = zoom * len(digit) / 2
    x, y = rng.uniform(reach, size - reach, 2)
    cos, sin, center = np.cos(angle) / zoom, np.sin(angle) / zoom, source.width / 2
    # Pillow takes the map from points of the canvas to points of the source.
    to_source = (
        *(cos, sin, center - cos * x - sin * y),
        *(-sin, cos, center + sin * x - cos * y),
    )
    drawn = source.transform(
        (size, size), Image.Transform.AFFINE, to_source, Image.Resampling.BICUBIC
    )
    return np.asarray(drawn, np.float32) / 255


def _all_visible(inks: list[np.ndarray]) -> bool:
    """Returns whether enough of every digit shows; the inks go from bottom to top."""
    above = np.zeros(inks[0].shape, bool)
    for ink in reversed(inks):
        stroke = ink > _INK
        if (stroke & ~above).sum() < _VISIBLE * stroke.sum():
            return False
        above |= stroke
    return True


def _surface(
    level: float, saturation: float, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a patchy, grainy surface of random hue, (size, size, 3)."""
    hue = saturation * rng.uniform(-1, 1, 3)
    patches = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 0.025, (size, size, 1))
    surface: np.ndarray = level + hue - hue.mean() + 0.2 * (smooth / 255 - 0.5) + grain
    return surface


def _paint(canvas: np.ndarray, ink: np.ndarray, surface: np.ndarray) -> None:
    """Paints a digit with a surface, and its shadow, onto the canvas."""
    offset = len(ink) // 20
    ink = ink[..., None]
    canvas *= 1 - 0.5 * _shifted(ink, offset)
    relief = 0.25 * (ink - _shifted(ink, offset // 2))  # > 0 on sides facing the light
    opacity = (4 * (ink - _INK) + 0.5).clip(0, 1)
    canvas += opacity * (surface + relief - canvas)


def _shifted(ink: np.ndarray, by: int) -> np.ndarray:
    """Moves the ink down and to the right."""
    return np.pad(ink, ((by, 0), (by, 0), (0, 0)))[: len(ink), : len(ink)]
