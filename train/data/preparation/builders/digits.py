"""Real handwritten digits, 8x8 pixels, that come with scikit-learn."""

import functools

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data.images import encode_png
from train.data.preparation.archives import Source
from train.data.preparation.builder import Example, ImageBuilder, Item

Arrays = tuple[np.ndarray, np.ndarray]


class Digits(ImageBuilder):
    """Real handwritten digits, 8x8 pixels, that come with scikit-learn.

    They are always split into the same 1,000 to train and 797 to test, with equal
    shares of all classes. With more training images, networks would make too few
    errors to compare.
    """

    NEEDS_SOURCE = False
    SHUFFLED = False  # splitting shuffles them already

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            },
            homepage="https://doi.org/10.24432/C50P49",
            citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, "
            "1998; the test images.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        del source  # they come with scikit-learn
        return {
            split: [
                Item(f"{i:04}", functools.partial(_example, image, label))
                for i, (image, label) in enumerate(zip(*arrays, strict=True))
            ]
            for split, arrays in split_digits().items()
        }


def split_digits() -> dict[str, Arrays]:
    """Returns images, uint8 (n, 8, 8), and labels, int (n,), of each split."""
    # They take a second to import, and only preparing needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, train_size=1000, stratify=digits.target, random_state=0
    )
    return {"train": (train_images, train_labels), "test": (test_images, test_labels)}


def _example(image: np.ndarray, label: int) -> Example:
    return {"image": encode_png(Image.fromarray(image)), "label": int(label)}
