"""The base of the builders of published segmentation datasets."""

from typing import Any, ClassVar

import tensorflow_datasets as tfds

from train.data.preparation.archives import Source
from train.data.preparation.builder import ImageBuilder, Item
from train.data.preparation.labels import Labels

Color = tuple[int, int, int]


class SegmentationBuilder(  # type: ignore[call-arg]
    ImageBuilder, skip_registration=True
):
    """Base of the builders whose masks have known classes, with a color for each.

    Attributes:
      COLORS: the color of each class by its name, in the order of mask values from 0.
      VOID: value of mask pixels without a class.
      HOMEPAGE: address of the dataset.
      CITATION: its publication.
    """

    COLORS: ClassVar[dict[str, Color]]
    VOID: ClassVar[int]
    HOMEPAGE: ClassVar[str]
    CITATION: ClassVar[str]

    def __init__(self, **kwargs: Any):
        """Makes a builder.

        Args:
          **kwargs: passed to `ImageBuilder`.
        """
        self._labels = Labels(list(self.COLORS), self.VOID)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(None, None, 1), labels=list(self.COLORS)
                ),
            },
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            ignore_label=self.VOID,
            colors=list(self.COLORS.values()),
        )

    def _item(self, source: Source, photo: str, mask: str) -> Item:
        """Returns a photo with its mask, which may have only the values of classes."""
        return self._labels.item(source, photo, mask)

    def _settle(self, source: Source) -> None:
        self.notes += self._labels.settle(source, self._items)
