"""Your own photos with label images."""

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import ImageBuilder, Item
from train.errors import UsageError


class SegmentationFolder(ImageBuilder):
    """Photos and their masks: SPLIT/images/*.jpg and SPLIT/masks/*.png.

    A mask has the name and the size of its photo; the value of a pixel is its class.
    Without split folders, it takes images/ and masks/ with a share to test on.
    """

    NEEDS_NAME = True

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        ignore_label: int = 255,
        test_fraction: float | None = None,
        **kwargs: Any,
    ):
        """Makes a builder.

        Args:
          classes: names of the classes, in the order of their values from 0; needed
            to prepare.
          ignore_label: value of pixels without a class.
          test_fraction: share of photos to test on, if there are no split folders.
          **kwargs: passed to `ImageBuilder`.
        """
        self._classes = list(classes or ())
        self._ignore_label = ignore_label
        if len(set(self._classes) - {""}) < len(self._classes):
            raise UsageError(
                f"classes must have different names, got {', '.join(self._classes)}"
            )
        if not len(self._classes) <= ignore_label <= 255:
            raise UsageError(
                f"ignore_label must be from {len(self._classes)}, the number of "
                f"classes, to 255, got {ignore_label}"
            )
        self._fraction = layout.check_fraction(test_fraction)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(None, None, 1), labels=self._classes or None
                ),
            },
            ignore_label=self._ignore_label,
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        if not self._classes:
            raise UsageError(
                "the values of masks need names: declare classes in order, such as "
                "background,road,car"
            )
        labels = {*range(len(self._classes)), self._ignore_label}
        root = layout.find_root(source, "images")
        splits = layout.split_folders(source, _above(root))
        items = {
            split: [
                layout.segmented(source, photo, mask, labels)
                for photo, mask in layout.match(
                    source, f"{prefix}images/", f"{prefix}masks/", self._bad
                )
            ]
            for split, prefix in (splits or {"train": root}).items()
        }
        return layout.divide(items, splits, self._fraction, lambda item: None)


def _above(prefix: str) -> str:
    """Returns the prefix of the folder that contains a folder."""
    return prefix.rstrip("/").rpartition("/")[0] + "/" if "/" in prefix[:-1] else ""
