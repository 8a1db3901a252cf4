"""CamVid in the form of 11 classes."""

from typing import ClassVar

from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import Item
from train.data.preparation.segmentation_builder import Color, SegmentationBuilder

_FOLDERS = {"train": "train", "validation": "val", "test": "test"}


class Camvid(SegmentationBuilder):
    """CamVid: street scenes from a car, 480x360, 11 classes and 11 for void.

    The folders are train, val and test, with label images in trainannot, valannot and
    testannot. The validation images come from a sequence that is also in the training
    images, so report the score on test.
    """

    COLORS: ClassVar[dict[str, Color]] = {
        "sky": (128, 128, 128),
        "building": (128, 0, 0),
        "pole": (192, 192, 128),
        "road": (128, 64, 128),
        "pavement": (60, 40, 222),
        "tree": (128, 128, 0),
        "sign_symbol": (192, 128, 128),
        "fence": (64, 64, 128),
        "car": (64, 0, 128),
        "pedestrian": (64, 64, 0),
        "bicyclist": (0, 128, 192),
    }
    VOID = 11
    HOMEPAGE = "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/"
    CITATION = (
        "Brostow, Fauqueur and Cipolla, Semantic Object Classes in Video, 2009; 11 "
        "classes: Badrinarayanan et al., SegNet, arXiv:1511.00561, 2015."
    )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.find_root(source, "trainannot")
        return {
            split: [
                self._item(source, photo, mask)
                for photo, mask in layout.match(
                    source, f"{root}{folder}/", f"{root}{folder}annot/", self._bad
                )
            ]
            for split, folder in _FOLDERS.items()
        }
