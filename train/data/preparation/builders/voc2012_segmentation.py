"""PASCAL VOC 2012 for segmentation, in its official layout."""

from typing import ClassVar

from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import Item
from train.data.preparation.segmentation_builder import Color, SegmentationBuilder

_LISTS = {"train": "train", "validation": "val"}


class Voc2012Segmentation(SegmentationBuilder):
    """PASCAL VOC 2012 segmentation: 1,464 and 1,449 photos, 21 classes, 255 for void.

    Reads the official VOCtrainval tar or the VOCdevkit folder. The labels of the test
    images are not public.
    """

    COLORS: ClassVar[dict[str, Color]] = {
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
    VOID = 255
    HOMEPAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    CITATION = (
        "Everingham et al., The PASCAL Visual Object Classes Challenge 2012 (VOC2012)."
    )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        folder = "ImageSets/Segmentation/"
        root = layout.find_root(source, f"{folder}train.txt")
        return {
            split: [
                self._item(
                    source,
                    f"{root}JPEGImages/{name}.jpg",
                    f"{root}SegmentationClass/{name}.png",
                )
                for name in layout.read_lines(source, f"{root}{folder}{file}.txt")
            ]
            for split, file in _LISTS.items()
        }
