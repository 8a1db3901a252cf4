"""Mini-ImageNet from a folder of images and lists of splits."""

import csv
from collections import defaultdict
from pathlib import PurePosixPath

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import ImageBuilder, Item

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class MiniImagenet(ImageBuilder):
    """Mini-ImageNet: a folder of images with train.csv, val.csv and test.csv.

    The lists have the columns filename and label. In the lists of Ravi and Larochelle
    no class is in two splits, as few-shot learning requires. To train a classifier, use
    lists that divide the images of every class.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(),  # named by the lists
            },
            homepage="https://openreview.net/forum?id=rJY0-Kcll",
            citation="Vinyals et al., Matching Networks for One Shot Learning, 2016; "
            "Ravi and Larochelle, Optimization as a Model for Few-Shot Learning, 2017.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.find_root(source, "train.csv")
        rows = {
            split: _read_csv(source, f"{root}{file}.csv")
            for split, file in _SPLITS.items()
            if f"{root}{file}.csv" in source
        }
        classes = sorted({label for split in rows.values() for _, label in split})
        labels = {name: i for i, name in enumerate(classes)}
        self._name_classes(classes)
        places = defaultdict(list)
        for name in source.names:
            places[PurePosixPath(name).name].append(name)
        items: dict[str, list[Item]] = {split: [] for split in rows}
        for split, found in rows.items():
            for file, label in found:
                name, *others = places.get(file, [file])
                if others:
                    self._bad(file, f"there are {name} and {', '.join(others)}")
                else:
                    items[split].append(layout.labeled(source, name, labels[label]))
        return items


def _read_csv(source: Source, name: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(layout.read_lines(source, name))
    if not {"filename", "label"} <= set(reader.fieldnames or ()):
        raise SourceError(
            f"{source.path}: {name} has the columns {reader.fieldnames}; expected "
            "filename and label"
        )
    return [(row["filename"], row["label"]) for row in reader]
