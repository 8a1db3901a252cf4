"""Your own images in folders of classes."""

from collections.abc import Iterable
from typing import Any

import tensorflow_datasets as tfds

from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import ImageBuilder, Item
from train.names import listed


def _check_case(source: Source, classes: Iterable[str]) -> None:
    """Refuses class folders that are one folder where case is ignored.

    Raises:
      SourceError: if there are such folders.
    """
    first: dict[str, str] = {}
    for name in sorted(classes):
        other = first.setdefault(name.casefold(), name)
        if other != name:
            raise SourceError(
                f"{source.path} has class folders {other} and {name}, which are one "
                "folder on systems that ignore case: merge them, or rename one"
            )


class ImageFolder(ImageBuilder):
    """Images in folders: SPLIT/CLASS/*.jpg, or CLASS/*.jpg with a share to test on.

    Splits are called train, val (or validation) and test. Classes are numbered in
    alphabetical order. Files may be JPEG, PNG, WebP, BMP, TIFF or GIF, of any size.
    """

    NEEDS_NAME = True

    def __init__(self, *, test_fraction: float | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          test_fraction: share of every class to test on, if there are no split folders.
          **kwargs: passed to `ImageBuilder`.
        """
        self._fraction = layout.check_fraction(test_fraction)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(),  # named after the folders
            }
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = layout.top_folder(source, contents=1)
        splits = layout.split_folders(source, root)
        found = {
            split: self._by_class(source, prefix)
            for split, prefix in (splits or {"train": root}).items()
        }
        _check_case(source, {name for by_class in found.values() for name in by_class})
        classes = sorted(name for name, files in found["train"].items() if files)
        items: dict[str, list[Item]] = {}
        for split, by_class in found.items():
            for name in by_class.keys() - set(classes):
                if by_class[name]:
                    self._bad(f"{splits[split]}{name}/", "a class that train/ lacks")
            items[split] = [
                layout.labeled(source, file, label)
                for label, name in enumerate(classes)
                for file in by_class.get(name, [])
            ]
        self._name_classes(classes)
        return layout.divide(
            source, items, splits.values(), self._fraction, lambda item: item.label
        )

    def _settle(self, source: Source) -> None:
        if len({item.label for item in self._items["train"]}) == 1:
            raise SourceError(
                f"{source.path}: all images to train on are of one class, as in "
                f"{self._items['train'][0].key}; expected folders of at least two "
                "classes beside each other"
            )
        super()._settle(source)

    def _by_class(self, source: Source, prefix: str) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {
            name: [] for name in layout.subfolders(source, prefix)
        }
        for name in source.names:
            folder, slash, _ = name.removeprefix(prefix).partition("/")
            if name.startswith(prefix) and not slash and layout.is_image(name):
                self._bad(name, f"in no class folder; expected {prefix}CLASS/...")
        for folder, inside in files.items():
            inside += layout.images_below(source, f"{prefix}{folder}/", self._bad)
        empty = [f"{prefix}{folder}/" for folder, inside in files.items() if not inside]
        if len(empty) == 1:
            self._bad(empty[0], "an empty class folder; expected images")
        elif empty:
            self._bad(
                prefix or "./",
                f"{len(empty)} empty class folders ({listed(empty)}); expected images",
            )
        return files
