"""Your own images in folders of classes."""

from collections import defaultdict
from typing import Any

import tensorflow_datasets as tfds

from train.data._builder import ImageBuilder, Item
from train.data._images import IMAGE_SUFFIXES
from train.data._source import Source
from train.data.builders import _layout


class ImageFolder(ImageBuilder):
    """Images in folders: SPLIT/CLASS/*.jpg, or CLASS/*.jpg with a share to test on.

    Splits are called train, val (or validation) and test. Classes are numbered in
    alphabetical order. Files may be JPEG, PNG or WebP, of any size.
    """

    NEEDS_NAME = True

    def __init__(self, *, test_fraction: float | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          test_fraction: share of every class to test on, where there are no splits.
          **kwargs: as any of these builders takes.
        """
        self._fraction = _layout.check_fraction(test_fraction)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(),  # named when the folders are seen
            }
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        root = _layout.top_folder(source, contents=1)
        splits = _layout.split_folders(source, root)
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
                _layout.labelled(source, file, label)
                for label, name in enumerate(classes)
                for file in by_class.get(name, [])
            ]
        self.info.features["label"].names = classes
        folder_of = {f: name for name, files in found["train"].items() for f in files}
        return _layout.divide(
            items, splits, self._fraction, lambda item: folder_of[item.key]
        )

    def _by_class(self, source: Source, prefix: str) -> dict[str, list[str]]:
        files = defaultdict(list, {n: [] for n in _layout.subfolders(source, prefix)})
        for name in source.names:
            folder, slash, _ = name.removeprefix(prefix).partition("/")
            if not name.startswith(prefix):
                continue
            if not slash:
                if _layout.is_image(name):
                    self._bad(name, f"in no class folder; expected {prefix}CLASS/...")
            elif _layout.is_image(name):
                files[folder].append(name)
            else:
                self._bad(name, f"expected an image, {' '.join(IMAGE_SUFFIXES)}")
        for folder in [name for name, found in files.items() if not found]:
            self._bad(f"{prefix}{folder}/", "an empty class folder; expected images")
        return files
