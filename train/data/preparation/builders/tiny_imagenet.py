"""Tiny ImageNet in its official layout."""

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import ImageBuilder, Item


class TinyImagenet(ImageBuilder):
    """Tiny ImageNet: 200 classes, 64x64, from the official tiny-imagenet-200 folder.

    The official test images have no labels and are left out. Scores are usually
    reported on the 10,000 validation images.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(64, 64, 3)),
                "label": tfds.features.ClassLabel(),  # named by wnids.txt
            },
            homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            citation="Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.find_root(source, "wnids.txt")
        classes = sorted(layout.read_lines(source, f"{root}wnids.txt"))
        labels = {name: i for i, name in enumerate(classes)}
        self.info.features["label"].names = classes
        train = []
        for name in classes:
            prefix = f"{root}train/{name}/images/"
            files = [
                n for n in source.names if n.startswith(prefix) and layout.is_image(n)
            ]
            if not files:
                self._bad(prefix, "an empty class folder; expected images")
            train += [layout.labeled(source, file, labels[name]) for file in files]
        validation = []
        for line in layout.read_lines(source, f"{root}val/val_annotations.txt"):
            file, name = (*line.split("\t"), "")[:2]
            if name not in labels:
                raise SourceError(
                    f"{source.path}: val_annotations.txt says {line!r}; expected a "
                    "file, a tab and a class of wnids.txt"
                )
            file = f"{root}val/images/{file}"
            validation.append(layout.labeled(source, file, labels[name]))
        return {"train": train, "validation": validation}
