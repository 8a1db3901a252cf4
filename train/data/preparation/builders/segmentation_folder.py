"""Your own photos with label images."""

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import ImageBuilder, Item
from train.data.preparation.labels import Labels
from train.errors import UsageError, see
from train.names import composed

_ROLES = layout.Roles(
    (
        (
            *("images", "image", "imgs", "img", "img_dir", "photos", "photo"),
            *("jpegimages", "inputs", "input", "rgb"),
        ),
        (
            *("masks", "mask", "labels", "label", "annotations", "annotation"),
            *("ann_dir", "annot", "targets", "target", "gt", "groundtruth"),
            *("ground_truth", "segmentations", "segmentation", "segmentationclass"),
        ),
    )
)


class SegmentationFolder(ImageBuilder):
    """Photos and their masks: SPLIT/images/*.jpg and SPLIT/masks/*.png.

    Also takes images/SPLIT/ and masks/SPLIT/, and other common names of the two, such
    as img_dir/ and ann_dir/. A mask has the name and the size of its photo; the value
    of a pixel is its class. With two classes, masks in black and white are taken too.
    Without split folders, images/ and masks/ need a share to test on.
    """

    NEEDS_NAME = True

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        ignore_label: int | None = None,
        test_fraction: float | None = None,
        **kwargs: Any,
    ):
        """Makes a builder.

        Args:
          classes: names of the classes, in the order of their values from 0; needed
            to prepare.
          ignore_label: value of pixels without a class; 255 if None, unless white is
            the second of two classes (see `Labels`). With 0, the values of the classes
            begin at 1.
          test_fraction: share of photos to test on, if there are no split folders.
          **kwargs: passed to `ImageBuilder`.
        """
        self._classes = [composed(name) for name in classes or ()]
        if len(set(self._classes) - {""}) < len(self._classes):
            raise UsageError(
                f"classes must have different names, got {', '.join(self._classes)}"
            )
        if len(self._classes) == 1:
            raise UsageError(
                f"classes must be at least two, got {self._classes[0]}: name all else "
                f"too, as in background,{self._classes[0]}"
            )
        if ignore_label and not len(self._classes) <= ignore_label <= 255:
            raise UsageError(
                "ignore_label must be 0, if the values of the classes begin at 1, or "
                f"from {len(self._classes)}, the number of classes, to 255, got "
                f"{ignore_label}"
            )
        if len(self._classes) > 255:
            raise UsageError(f"classes must be at most 255, got {len(self._classes)}")
        self._labels = Labels(self._classes, ignore_label)
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
            ignore_label=self._labels.stored_ignore_label,
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        if not self._classes:
            raise UsageError(
                "the values of masks need names: declare classes in order, such as "
                "background,road,car" + see("data.md#your-own-files")
            )
        folders = layout.paired_folders(source, _ROLES)
        items = {
            split or "train": [
                self._labels.item(source, photo, mask)
                for photo, mask in layout.match(source, photos, masks, self._bad)
            ]
            for split, (photos, masks) in folders.items()
        }
        return layout.divide(
            source, items, list(filter(None, folders)), self._fraction, lambda _: None
        )

    def _settle(self, source: Source) -> None:
        self.notes += self._labels.settle(source, self._items)
