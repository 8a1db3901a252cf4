"""Fashion-MNIST from its official files."""

import functools
import gzip
import io
import struct
import zlib
from typing import BinaryIO, cast

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data.images import encode_png
from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import Example, ImageBuilder, Item

_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_SIDE = 28


class FashionMnistIdx(ImageBuilder):
    """Fashion-MNIST: 70,000 gray images of clothes, 28x28, from its official files."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            {
                "image": tfds.features.Image(shape=(_SIDE, _SIDE, 1)),
                "label": tfds.features.ClassLabel(names=_CLASSES),
            },
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation="Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017.",
        )

    def _list(self, source: Source) -> dict[str, list[Item]]:
        return {"train": _items(source, "train"), "test": _items(source, "t10k")}


def _items(source: Source, stem: str) -> list[Item]:
    images = _read_idx(source, f"{stem}-images-idx3-ubyte", (_SIDE, _SIDE))
    labels = _read_idx(source, f"{stem}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max(initial=0) >= len(_CLASSES):
        raise SourceError(
            f"{source.path}: {len(labels)} labels up to {labels.max(initial=0)} for "
            f"{len(images)} images of {stem}; expected as many, below {len(_CLASSES)}"
        )

    def make(i: int) -> Example:
        return {
            "image": encode_png(Image.fromarray(images[i])),
            "label": int(labels[i]),
        }

    return [Item(f"{i:05}", functools.partial(make, i)) for i in range(len(images))]


def _read_idx(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an array of uint8 from an IDX file, gzipped or not."""
    zipped = any(file.endswith(f"{name}.gz") for file in source.names)
    name += ".gz" * zipped
    file = layout.find_root(source, name) + name
    dimensions = 1 + len(shape)
    try:
        stream: BinaryIO = io.BytesIO(layout.read(source, file))
        if zipped:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
        header = stream.read(4 + 4 * dimensions)
        zeros, kind, rank = struct.unpack(">HBB", header[:4])
        count, *found = struct.unpack(f">{dimensions}I", header[4:])
        if (zeros, kind, rank, *found) != (0, 8, dimensions, *shape):
            raise ValueError("it has another header")
        size = count * int(np.prod(shape))
        content = stream.read(size + 1)
        if len(content) != size:
            raise ValueError(f"it does not hold the {size:,} bytes its header says")
    except (
        struct.error,
        ValueError,
        EOFError,
        OSError,
        zlib.error,
        MemoryError,
    ) as error:
        expected = "x".join(("N", *map(str, shape)))
        raise SourceError(
            f"{source.path}: {file} is not an IDX file of {expected} unsigned bytes: "
            f"{error}"
        ) from None
    return np.frombuffer(content, np.uint8).reshape(count, *shape)
