"""Scenes composed from real digits, to segment or to translate from drawings."""

import functools

import tensorflow_datasets as tfds
from PIL import Image

from train.data.images import encode_png
from train.data.preparation import scenes
from train.data.preparation.archives import Source
from train.data.preparation.builder import Example, ImageBuilder, Item
from train.data.preparation.builders.digits import Arrays, split_digits

_COUNTS = {"train": 2000, "test": 500}
_SIDE = 64


class DigitScenes(ImageBuilder):
    """Scenes of several real handwritten digits, 64x64, with their label images.

    Digits differ in size, color and texture, and may overlap; no digit is in both
    splits. The same versions of NumPy and Pillow give the same scenes. Each comes with
    a drawing of its labels, so that it can be segmented, or painted from the drawing.
    """

    NEEDS_SOURCE = False

    def _info(self) -> tfds.core.DatasetInfo:
        side = (_SIDE, _SIDE)
        return self._describe(
            {
                "image": tfds.features.Image(shape=(*side, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(*side, 1), labels=list(scenes.CLASS_NAMES)
                ),
                "drawing": tfds.features.Image(shape=(*side, 3)),
            },
            homepage="https://doi.org/10.24432/C50P49",
            citation="Digits: Alpaydin and Kaynak, Optical Recognition of Handwritten "
            "Digits, 1998.",
            colors=list(scenes.COLORS),
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        del source  # the digits come with scikit-learn
        return {
            split: [
                Item(f"{i:04}", functools.partial(_example, digits, seed, i))
                for i in range(_COUNTS[split])
            ]
            for seed, (split, digits) in enumerate(split_digits().items())
        }


def _example(digits: Arrays, seed: int, index: int) -> Example:
    images, labels = digits
    scene = scenes.compose(
        images[..., None], labels, seed=seed, index=index, size=_SIDE
    )
    return {
        name: encode_png(Image.fromarray(array))
        for name, array in scene._asdict().items()
    }
