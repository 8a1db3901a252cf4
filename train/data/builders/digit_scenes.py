"""Scenes composed from real digits, to segment or to draw from their labels."""

import functools

import tensorflow_datasets as tfds
from PIL import Image

from train.data import _scenes
from train.data._builder import Example, ImageBuilder, Item
from train.data._images import encode_png
from train.data._source import Source
from train.data.builders.digits import Arrays, split_digits

_COUNTS = {"train": 2000, "test": 500}
_SIDE = 64


class DigitScenes(ImageBuilder):
    """Scenes of several real handwritten digits, 64x64, with their label images.

    Digits differ in size, colour and texture, and overlap; no digit is in both splits.
    Scenes are the same wherever the versions of NumPy and Pillow are. A drawing of the
    labels goes with each, so that scenes can be segmented, or painted from it.
    """

    NEEDS_SOURCE = False

    def _info(self) -> tfds.core.DatasetInfo:
        side = (_SIDE, _SIDE)
        return self._describe(
            {
                "image": tfds.features.Image(shape=(*side, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(*side, 1), labels=list(_scenes.CLASS_NAMES)
                ),
                "drawing": tfds.features.Image(shape=(*side, 3)),
            },
            homepage="https://doi.org/10.24432/C50P49",
            citation="Digits: Alpaydin and Kaynak, Optical Recognition of Handwritten "
            "Digits, 1998.",
            colors=list(_scenes.COLORS),
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        del source  # digits come with scikit-learn
        return {
            split: [
                Item(f"{i:04}", functools.partial(_example, digits, seed, i))
                for i in range(_COUNTS[split])
            ]
            for seed, (split, digits) in enumerate(split_digits().items())
        }


def _example(digits: Arrays, seed: int, index: int) -> Example:
    images, labels = digits
    scene = _scenes.compose(
        images[..., None], labels, seed=seed, index=index, size=_SIDE
    )
    return {
        name: encode_png(Image.fromarray(array))
        for name, array in scene._asdict().items()
    }
