"""Your own images in folders of classes."""

from collections import defaultdict
from typing import Any

import tensorflow_datasets as tfds

from train.data.images import IMAGE_SUFFIXES
from train.data.preparation import layout
from train.data.preparation.archives import Source
from train.data.preparation.builder import ImageBuilder, Item


class ImageFolder(ImageBuilder):
    """Images in folders: SPLIT/CLASS/*.jpg, or CLASS/*.jpg with a share to test on.

    Splits are called train, val (or validation) and test. Classes are numbered in
    alphabetical order. Files may be JPEG, PNG or WebP, of any size.
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
        self.info.features["label"].names = classes
        folder_of = {f: name for name, files in found["train"].items() for f in files}
        return layout.divide(
            items, splits, self._fraction, lambda item: folder_of[item.key]
        )

    def _by_class(self, source: Source, prefix: str) -> dict[str, list[str]]:
        files: dict[str, list[str]] = defaultdict(list)
        files |= {name: [] for name in layout.subfolders(source, prefix)}
        for name in source.names:
            folder, slash, _ = name.removeprefix(prefix).partition("/")
            if not name.startswith(prefix):
                continue
            if not slash:
                if layout.is_image(name):
                    self._bad(name, f"in no class folder; expected {prefix}CLASS/...")
            elif layout.is_image(name):
                files[folder].append(name)
            else:
                self._bad(name, f"expected an image, {' '.join(IMAGE_SUFFIXES)}")
        for folder in [name for name, found in files.items() if not found]:
            self._bad(f"{prefix}{folder}/", "an empty class folder; expected images")
        return files
