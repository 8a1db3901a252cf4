"""Pairs of pictures in pix2pix form."""

from typing import Any

import tensorflow_datasets as tfds

from train.data.images import BadFileError, check_photo
from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import Example, ImageBuilder, Item


class PairedImages(ImageBuilder):
    """Pairs side by side in one picture, A left and B right, as pix2pix has them.

    Takes maps, facades, cityscapes and your own: SPLIT/*.jpg, or *.jpg with a share to
    test on. The direction of translation is chosen when the dataset is read.
    """

    NEEDS_NAME = True

    def __init__(self, *, test_fraction: float | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          test_fraction: share of pairs to test on, if there are no split folders.
          **kwargs: passed to `ImageBuilder`.
        """
        self._fraction = layout.check_fraction(test_fraction)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {"pair": tfds.features.Image(shape=(None, None, 3))},
            homepage="https://phillipi.github.io/pix2pix/",
            citation="Isola et al., Image-to-Image Translation with Conditional "
            "Adversarial Networks, arXiv:1611.07004, 2016.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.top_folder(source, contents=0)
        splits = layout.split_folders(source, root)
        items = {
            split: [
                _pair(source, name)
                for name in source.names
                if name.startswith(prefix) and layout.is_image(name)
            ]
            for split, prefix in (splits or {"train": root}).items()
        }
        return layout.divide(items, splits, self._fraction, lambda item: None)


def _pair(source: Source, name: str) -> Item:
    def make() -> Example:
        photo = check_photo(layout.read(source, name), name)
        if photo.size[0] % 2:
            raise BadFileError(
                name, f"{photo.size[0]} pixels wide; expected two halves of equal width"
            )
        return {"pair": photo.data}

    return Item(name, make)
