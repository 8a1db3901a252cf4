"""What a dataset is to the tasks: named splits of examples, decoded to one size."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from train.data._builder import map_threads
from train.data._cache import write_arrays
from train.data._images import decode
from train.errors import UsageError
from train.progress import Progress, silent

Arrays = dict[str, np.ndarray]
_BYTES_AT_ONCE = 1 << 22
_MAX_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """How one array of an example comes from a feature of a TFDS dataset.

    Attributes:
      feature: the feature's name.
      kind: "image", uint8 (height, width, channels); "mask", uint8 (height, width);
        or "label", int32 ().
      channels: of an image.
      half: "a" or "b" for the left or right half of a picture, or "" for all of it.
      lookup: what a mask's values become, 256 bytes, or None.
    """

    feature: str
    kind: str
    channels: int = 1
    half: str = ""
    lookup: bytes | None = None

    @property
    def key(self) -> str:
        """What the field is called, whatever its part in a task."""
        return "-".join(filter(None, (self.feature, self.half)))

    def read(self, example: Mapping[str, Any]) -> np.ndarray:
        """The array, at its own size."""
        value = example[self.feature]
        if self.kind == "label":
            return np.asarray(value, np.int32)
        array = decode(value, self.channels)
        middle = array.shape[1] // 2
        if self.half:
            array = array[:, :middle] if self.half == "a" else array[:, middle:]
        if self.kind == "mask":
            array = array[..., 0]
        if self.lookup is not None:
            array = np.frombuffer(self.lookup, np.uint8)[array]
        return array


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Makes arrays of one size from stored examples.

    Attributes:
      fields: what to read, by the names that the task knows.
      size: (height, width) of every image and mask.
      fit: how images of other sizes come to it. "crop" scales until the image covers
        the size and crops the middle; "pad" scales until it fits and fills the rest
        with zeros, or the ignored label; "stretch" gives up its proportions.
      ignore_label: value of mask pixels without a class.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    fit: str
    ignore_label: int = 255

    def __call__(self, example: Mapping[str, Any]) -> Arrays:
        """The arrays of one example."""
        return {
            name: self.fitted(field.read(example), field.kind)
            for name, field in self.fields.items()
        }

    def fitted(self, array: np.ndarray, kind: str) -> np.ndarray:
        """An array of a kind of `Field`, brought to the size."""
        if kind == "label" or array.shape[:2] == self.size:
            return array
        squeezed = array[..., 0] if array.shape[2:] == (1,) else array
        image = Image.fromarray(squeezed)
        size = self.size[::-1]
        by = Image.Resampling.NEAREST if kind == "mask" else Image.Resampling.BICUBIC
        if self.fit == "crop":
            image = ImageOps.fit(image, size, by)
        elif self.fit == "pad":
            fill = self.ignore_label if kind == "mask" else 0
            image = ImageOps.pad(image, size, by, fill)
        else:
            image = image.resize(size, by)
        return np.asarray(image).reshape(*self.size, *array.shape[2:])

    @property
    def spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array."""
        shapes = {"image": lambda f: (*self.size, f.channels)}
        shapes |= {"mask": lambda f: self.size, "label": lambda f: ()}
        return {
            name: (
                shapes[field.kind](field),
                np.dtype(np.int32 if field.kind == "label" else np.uint8),
            )
            for name, field in self.fields.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Examples in a fixed order, read from disk when asked for.

    Attributes:
      name: of the split as it was prepared.
      records: the TFDS data source; images are still encoded.
      reader: decodes them.
      cache: folder of decoded arrays.
      rows: which of the records belong to this split.
    """

    name: str
    records: Any
    reader: Reader
    cache: Path
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Size of all examples, decoded."""
        spec = self.reader.spec.values()
        return len(self) * sum(dtype.itemsize * _size(shape) for shape, dtype in spec)

    def read(self, rows: Sequence[int]) -> Arrays:
        """Decodes some examples and stacks them."""
        records = self.records.__getitems__([self.rows[int(i)] for i in rows])
        examples = [self.reader(record) for record in records]
        return {
            name: np.stack([example[name] for example in examples])
            for name in self.reader.fields
        }

    def arrays(self, progress: Progress = silent) -> Arrays:
        """All examples, mapped from a cache that is made at the first call.

        Any number of processes may call this at once: one decodes, the others wait.

        Raises:
          UsageError: if the cache cannot be written.
        """
        form = "x".join(map(str, self.reader.size)) + f"-{self.reader.fit}"
        paths = {
            name: self.cache / f"{self.name}-{field.key}-{form}.npy"
            for name, field in self.reader.fields.items()
        }
        spec = self.reader.spec
        num_records = len(self.records)
        if not all(path.exists() for path in paths.values()):
            whole = dataclasses.replace(self, rows=range(num_records))
            at_once = max(1, _BYTES_AT_ONCE * num_records // whole.num_bytes)
            at_once = min(at_once, _MAX_AT_ONCE)  # what is read may be far larger
            starts = range(0, num_records, at_once)

            def read(start: int) -> Arrays:
                return whole.read(range(start, min(start + at_once, num_records)))

            with progress(f"decoding {self.name}", num_records) as reporter:
                write_arrays(
                    paths, spec, num_records, map_threads(read, starts), reporter
                )
        part = slice(self.rows.start, self.rows.stop)
        return {
            name: np.load(path, mmap_mode="r")[part] for name, path in paths.items()
        }

    def part(self, start: int, stop: int) -> "Split":
        """Some of the examples, as a split of its own."""
        return dataclasses.replace(self, rows=self.rows[start:stop])


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Splits of examples, with what is needed to normalise and interpret them.

    Attributes:
      name: the name it is loaded by.
      task: "classification" with the arrays "image" and "label"; "segmentation" with
        "image" and "mask"; or "translation" with "input" and "target".
      splits: by name: "train", and "validation" or "test" or both.
      class_names: of classes in the order of their numbers; () for translation.
      ignore_label: value of mask pixels without a class, or None.
      colors: (classes, 3), RGB of the classes from 0 to 255, or None.
      mean: per channel, of the training images scaled to [0, 1].
      std: likewise the standard deviation; 1 for a channel that never changes.
    """

    name: str
    task: str
    splits: Mapping[str, Split]
    class_names: tuple[str, ...] = ()
    ignore_label: int | None = None
    colors: np.ndarray | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""
        return len(self.class_names)

    def split(self, name: str) -> Split:
        """A split by its name.

        Raises:
          UsageError: if there is none; the message lists those there are.
        """
        if name not in self.splits:
            raise UsageError(
                f"{self.name} has no split {name!r}; it has {', '.join(self.splits)} "
                "(--evaluate-on validation takes that, or a part of train)"
            )
        return self.splits[name]

    def hold_out(self, fraction: float = 0.2) -> "Dataset":
        """Makes a validation split of the last part of the training split.

        To choose settings by, so that test images keep out of every choice. A dataset
        that comes with a validation split is returned as it is.
        """
        if "validation" in self.splits:
            return self
        train = self.split("train")
        n = len(train) - math.ceil(len(train) * fraction)
        parts = {"train": train.part(0, n), "validation": train.part(n, len(train))}
        return dataclasses.replace(self, splits={**self.splits, **parts})


def describe(dataset: Dataset) -> dict[str, Any]:
    """All but the examples, as JSON has it: enough to use what was trained on them."""
    reader = dataset.split("train").reader
    fields = {name: dataclasses.asdict(f) for name, f in reader.fields.items()}
    for field in fields.values():
        del field["lookup"]  # of bytes, and of no use without examples
    return {
        "name": dataset.name,
        "task": dataset.task,
        "class_names": dataset.class_names,
        "ignore_label": dataset.ignore_label,
        "colors": None if dataset.colors is None else dataset.colors.tolist(),
        "mean": dataset.mean,
        "std": dataset.std,
        "reader": dataclasses.asdict(reader) | {"fields": fields},
    }


def from_description(described: Mapping[str, Any]) -> Dataset:
    """The dataset that `describe` told of, with a training split of no examples."""
    reader = described["reader"]
    fields = {name: Field(**field) for name, field in reader["fields"].items()}
    reader = Reader(**{**reader, "fields": fields, "size": tuple(reader["size"])})
    colors = described["colors"]
    train = Split(name="train", records=(), reader=reader, cache=Path(), rows=range(0))
    return Dataset(
        name=described["name"],
        task=described["task"],
        splits={"train": train},
        class_names=tuple(described["class_names"]),
        ignore_label=described["ignore_label"],
        colors=None if colors is None else np.asarray(colors, np.uint8),
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
    )
