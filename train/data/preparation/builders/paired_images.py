"""Pairs of pictures in pix2pix form."""

import collections
import functools
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data.images import BadFileError, check_photo, decode, encode_png
from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import Example, ImageBuilder, Item
from train.errors import see
from train.names import listed

_TWO_FOLDERS = (
    layout.Roles((("A",), ("B",))),
    layout.Roles((("input", "inputs"), ("target", "targets"))),
    layout.Roles((("source", "sources"), ("target", "targets"))),
)


class PairedImages(ImageBuilder):
    """Pairs: A left and B right in one picture, as in pix2pix, or folders A and B.

    Takes maps, facades, cityscapes and your own: SPLIT/*.jpg, or *.jpg with a share to
    test on. The two pictures of a pair may also be files of one name in two folders,
    SPLIT/A/ and SPLIT/B/, or A/SPLIT/ and B/SPLIT/; input/ and target/ mean the same.
    The direction of translation is chosen when the dataset is read.
    """

    NEEDS_NAME = True

    def __init__(self, *, test_fraction: float | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          test_fraction: share of pairs to test on, if there are no split folders.
          **kwargs: passed to `ImageBuilder`.
        """
        self._fraction = layout.check_fraction(test_fraction)
        self._sizes: dict[str, tuple[int, int]] = {}  # of pictures that are cut
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {"pair": tfds.features.Image(shape=(None, None, 3))},
            homepage="https://phillipi.github.io/pix2pix/",
            citation="Isola et al., Image-to-Image Translation with Conditional "
            "Adversarial Networks, arXiv:1611.07004, 2016.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        _refuse_one_side(source.path.absolute())
        names = [PurePosixPath(folder).name for folder in source.folders]
        for roles in _TWO_FOLDERS:
            if {0, 1} <= set(map(roles.of, names)):
                return self._list_two(source, roles)
        return self._list_halves(source)

    def _list_two(self, source: Source, roles: layout.Roles) -> dict[str, list[Item]]:
        """Lists pairs whose pictures are files of one name in two folders."""
        folders = layout.paired_folders(source, roles)
        items = {
            split or "train": [
                Item(a, functools.partial(_joined, source, a, b), files=(b,))
                for a, b in layout.match(
                    source, *prefixes, self._bad, ("picture A", "picture B")
                )
            ]
            for split, prefixes in folders.items()
        }
        splits = list(filter(None, folders))
        return layout.divide(source, items, splits, self._fraction, lambda _: None)

    def _list_halves(self, source: Source) -> dict[str, list[Item]]:
        """Lists pairs side by side in one picture."""
        root = layout.top_folder(source, contents=0)
        splits = layout.split_folders(source, root)
        items: dict[str, list[Item]] = {}
        for split, prefix in (splits or {"train": root}).items():
            below = {
                name.removeprefix(prefix).partition("/")[0]
                for name in source.names
                if layout.is_image(name) and "/" in name.removeprefix(prefix)
                if name.startswith(prefix)
            }
            if below:
                raise SourceError(
                    f"{source.path}: {prefix or 'it'} holds folders "
                    f"({listed(sorted(below))}); expected pictures of two halves "
                    "directly inside train/ and test/, or the two pictures of a pair "
                    "in train/A/ and train/B/"
                )
            items[split] = [
                Item(name, functools.partial(self._halves, source, name))
                for name in layout.images_below(source, prefix, self._bad)
            ]
        return layout.divide(
            source, items, splits.values(), self._fraction, lambda _: None
        )

    def _halves(self, source: Source, name: str) -> Example:
        photo = check_photo(layout.read(source, name), name)
        if photo.size[0] % 2:
            raise BadFileError(
                name, f"{photo.size[0]} pixels wide; expected two halves of equal width"
            )
        self._sizes[name] = photo.size
        return {"pair": photo.data}

    def _settle(self, source: Source) -> None:
        items = [item for split in self._items.values() for item in split]
        sizes = [self._sizes[item.key] for item in items if item.key in self._sizes]
        if not sizes:
            return
        (width, height), _ = collections.Counter(sizes).most_common(1)[0]
        cut = f"{width}x{height} pixels into two of {width // 2}x{height}"
        if all(width <= height for width, height in sizes):
            raise SourceError(
                f"{source.path}: no picture is wider than high, so they seem to be no "
                f"pairs side by side, which are cut in the middle, {cut}: put the two "
                "pictures of each pair into train/A/ and train/B/, under the same name"
                + see("data.md#your-own-files")
            )
        self.notes.append(
            f"each picture is cut into a left half, A, and a right half, B, such as "
            f"{cut}; if they are no pairs, put A and B into two folders instead"
        )


def _refuse_one_side(path: Path) -> None:
    """Refuses one of two folders that hold the pictures of pairs together.

    Raises:
      SourceError: if the folder is named after a side, and the other is beside it.
    """
    side = path.parent if layout.split_of(path.name) else path
    for roles in _TWO_FOLDERS:
        role = roles.of(side.name)
        if role is None:
            continue
        for other in sorted(side.parent.iterdir()):
            if other.is_dir() and roles.of(other.name) == 1 - role:
                raise SourceError(
                    f"{path} holds one side of pairs, and {other} the other one: give "
                    f"the folder of both, {side.parent}"
                )


def _joined(source: Source, *names: str) -> Example:
    a, b = (check_photo(layout.read(source, name), name) for name in names)
    if a.size != b.size:
        found, expected = ("{}x{}".format(*photo.size) for photo in (b, a))
        raise BadFileError(
            names[1], f"{found} pixels; expected {expected} as {names[0]}"
        )
    pair = np.concatenate([decode(photo.data, 3) for photo in (a, b)], axis=1)
    return {"pair": encode_png(Image.fromarray(pair))}
