"""CamVid in the form of 11 classes."""

import tensorflow_datasets as tfds

from train.data._builder import ImageBuilder, Item
from train.data._source import Source
from train.data.builders import _layout

_COLORS = {
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
_VOID = 11
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}


class Camvid(ImageBuilder):
    """CamVid: street scenes from a car, 480x360, 11 classes and 11 for void.

    The folders are train, val and test, with label images in trainannot, valannot and
    testannot. The validation images are of a sequence that training images are of as
    well, so report the score on test.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "mask": tfds.features.LabeledImage(
                    shape=(None, None, 1), labels=list(_COLORS)
                ),
            },
            homepage="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
            citation="Brostow, Fauqueur and Cipolla, Semantic Object Classes in Video, "
            "2009; 11 classes: Badrinarayanan et al., SegNet, arXiv:1511.00561, 2015.",
            ignore_label=_VOID,
            colors=list(_COLORS.values()),
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = _layout.find_root(source, "trainannot")
        labels = {*range(len(_COLORS)), _VOID}
        return {
            split: [
                _layout.segmented(source, photo, mask, labels)
                for photo, mask in _layout.match(
                    source, f"{root}{folder}/", f"{root}{folder}annot/", self._bad
                )
            ]
            for split, folder in _FOLDERS.items()
        }
