"""Tiny ImageNet in its official layout."""

import collections

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import ImageBuilder, Item
from train.names import listed


class TinyImagenet(ImageBuilder):
    """Tiny ImageNet: 200 classes, 64x64, from the official tiny-imagenet-200 folder.

    The official test images have no labels and are left out. Scores are usually
    reported on the 10,000 validation images.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(64, 64, 3)),
                "label": tfds.features.ClassLabel(),  # named by wnids.txt and words.txt
            },
            homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            citation="Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.find_root(source, "wnids.txt")
        wnids = sorted(set(layout.read_lines(source, f"{root}wnids.txt")))
        images: dict[str, list[str]] = {wnid: [] for wnid in wnids}
        for name in filter(layout.is_image, source.names):
            top, _, rest = name.removeprefix(f"{root}train/").partition("/images/")
            if rest and name.startswith(f"{root}train/") and top in images:
                images[top].append(name)
        classes = [wnid for wnid in wnids if images[wnid]]
        if empty := [wnid for wnid in wnids if not images[wnid]]:
            self._bad(
                f"{root}train/",
                f"no images of {len(empty)} of the {len(wnids)} classes of wnids.txt "
                f"({listed(empty)}); expected all, or skip_bad to leave out these "
                "classes and their validation images",
            )
        labels = {wnid: label for label, wnid in enumerate(classes)}
        self._name_classes(_readable(source, root, classes))
        train = [
            layout.labeled(source, file, labels[wnid])
            for wnid in classes
            for file in images[wnid]
        ]
        validation = []
        for line in layout.read_lines(source, f"{root}val/val_annotations.txt"):
            file, wnid = (*line.split("\t"), "")[:2]
            if wnid not in images:
                raise SourceError(
                    f"{source.path}: val_annotations.txt says {line!r}; expected a "
                    "file, a tab and a class of wnids.txt"
                )
            if wnid in labels:
                file = f"{root}val/images/{file}"
                validation.append(layout.labeled(source, file, labels[wnid]))
        return {"train": train, "validation": validation}


def _readable(source: Source, root: str, wnids: list[str]) -> list[str]:
    """Returns the first name of each class in words.txt, if it is the only such one."""
    file = f"{root}words.txt"
    lines = layout.read_lines(source, file) if file in source else []
    words = {wnid: names for wnid, _, names in (x.partition("\t") for x in lines)}
    names = [words.get(wnid, "").partition(",")[0].strip() or wnid for wnid in wnids]
    counts = collections.Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, wnids, strict=True)
    ]
