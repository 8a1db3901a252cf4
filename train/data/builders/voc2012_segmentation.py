"""PASCAL VOC 2012 for segmentation, in its official layout."""

import tensorflow_datasets as tfds

from train.data._builder import ImageBuilder, Item
from train.data._source import Source
from train.data.builders import _layout

_COLORS = {
    "background": (0, 0, 0),
    "aeroplane": (128, 0, 0),
    "bicycle": (0, 128, 0),
    "bird": (128, 128, 0),
    "boat": (0, 0, 128),
    "bottle": (128, 0, 128),
    "bus": (0, 128, 128),
    "car": (128, 128, 128),
    "cat": (64, 0, 0),
    "chair": (192, 0, 0),
    "cow": (64, 128, 0),
    "diningtable": (192, 128, 0),
    "dog": (64, 0, 128),
    "horse": (192, 0, 128),
    "motorbike": (64, 128, 128),
    "person": (192, 128, 128),
    "pottedplant": (0, 64, 0),
    "sheep": (128, 64, 0),
    "sofa": (0, 192, 0),
    "train": (128, 192, 0),
    "tvmonitor": (0, 64, 128),
}
_VOID = 255
_LISTS = {"train": "train", "validation": "val"}


class Voc2012Segmentation(ImageBuilder):
    """PASCAL VOC 2012 segmentation: 1,464 and 1,449 photos, 21 classes, 255 for void.

    Read from the official VOCtrainval tar or the VOCdevkit folder; the labels of its
    test images are not public.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(None, None, 1), labels=list(_COLORS)
                ),
            },
            homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
            citation="Everingham et al., The PASCAL Visual Object Classes Challenge "
            "2012 (VOC2012).",
            ignore_label=_VOID,
            colors=list(_COLORS.values()),
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        folder = "ImageSets/Segmentation/"
        root = _layout.find_root(source, f"{folder}train.txt")
        labels = {*range(len(_COLORS)), _VOID}
        return {
            split: [
                _layout.segmented(
                    source,
                    f"{root}JPEGImages/{name}.jpg",
                    f"{root}SegmentationClass/{name}.png",
                    labels,
                )
                for name in _layout.read_lines(source, f"{root}{folder}{file}.txt")
            ]
            for split, file in _LISTS.items()
        }
