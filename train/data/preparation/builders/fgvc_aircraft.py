"""FGVC-Aircraft in its official layout."""

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import ImageBuilder, Item

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class FgvcAircraft(ImageBuilder):
    """FGVC-Aircraft: 10,000 photos of 100 variants, from fgvc-aircraft-2013b.

    The lowest 20 rows of a photo, which name its photographer, are kept.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(),  # named by variants.txt
            },
            homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            citation="Maji et al., Fine-Grained Visual Classification of Aircraft, "
            "arXiv:1306.5151, 2013.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.find_root(source, "variants.txt")
        classes = layout.read_lines(source, f"{root}variants.txt")
        labels = {name: i for i, name in enumerate(classes)}
        self._name_classes(classes)
        items: dict[str, list[Item]] = {}
        for split, stem in _SPLITS.items():
            items[split] = []
            for line in layout.read_lines(source, f"{root}images_variant_{stem}.txt"):
                number, _, variant = line.partition(" ")
                if variant not in labels:
                    raise SourceError(
                        f"{source.path}: images_variant_{stem}.txt says {line!r}; "
                        "expected a number and a variant of variants.txt"
                    )
                file = f"{root}images/{number}.jpg"
                items[split].append(layout.labeled(source, file, labels[variant]))
        return items
