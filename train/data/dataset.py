"""Datasets as tasks see them: named splits of examples, decoded to one size."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from train.data import boxes
from train.data.cache import Spec, open_arrays, write_arrays
from train.data.images import decode, size_of
from train.data.threads import map_threads
from train.errors import UsageError
from train.names import printable
from train.progress import Progress, silent

Arrays = dict[str, np.ndarray]
_BYTES_AT_ONCE = 1 << 22
_MAX_AT_ONCE = 64
# array_record raises RuntimeError, and a record cannot be parsed or decoded then.
_DAMAGE = (RuntimeError, OSError, ValueError, LookupError, TypeError, SyntaxError)


@contextlib.contextmanager
def damage_explained(folder: Path) -> Iterator[None]:
    """Turns what readers raise on damaged records of a dataset into one line.

    Args:
      folder: folder of the dataset.

    Raises:
      UsageError: if reading fails in the block.
    """
    try:
        yield
    except _DAMAGE as error:
        text = printable(" ".join(f"{error!r}".split()))[:200]
        raise UsageError(
            f"{folder} is damaged ({text}): remove it and prepare the dataset again"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Describes how one array of an example is read from a feature of a TFDS dataset.

    Attributes:
      feature: name of the feature.
      kind: "image", uint8 (height, width, channels); "mask", uint8 (height, width);
        or "label", int32 ().
      channels: channels of an image.
      half: "a" or "b" for the left or right half of a picture, "" for all of it.
      lookup: the new value of each value of a mask, 256 bytes; None to keep the values.
    """

    feature: str
    kind: str
    channels: int = 1
    half: str = ""
    lookup: bytes | None = None

    @property
    def key(self) -> str:
        """A name for the field that does not depend on the task."""
        return "-".join(filter(None, (self.feature, self.half)))

    def read(self, example: Mapping[str, Any]) -> np.ndarray:
        """Returns the array of this field, at its stored size."""
        return read_fields({"": self}, example)[""]

    def stored_size(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """Returns (height, width) of the stored picture, without decoding it."""
        height, width = size_of(example[self.feature])
        if self.half:
            width = width // 2 if self.half == "a" else width - width // 2
        return height, width

    def select(self, array: np.ndarray) -> np.ndarray:
        """Returns the part of a decoded picture that belongs to the field.

        Args:
          array: the picture, uint8 (height, width, channels).
        """
        middle = array.shape[1] // 2
        if self.half:
            array = array[:, :middle] if self.half == "a" else array[:, middle:]
        if self.kind == "mask":
            array = array[..., 0]
        if self.lookup is not None:
            array = np.frombuffer(self.lookup, np.uint8)[array]
        return array


def read_fields(fields: Mapping[str, Field], example: Mapping[str, Any]) -> Arrays:
    """Returns the arrays of some fields, at their stored size.

    A picture from which several fields are read is decoded once.
    """
    decoded: dict[tuple[str, int], np.ndarray] = {}
    arrays = {}
    for name, field in fields.items():
        value = example[field.feature]
        if field.kind == "label":
            arrays[name] = np.asarray(value, np.int32)
            continue
        picture = (field.feature, field.channels)
        if picture not in decoded:
            decoded[picture] = decode(value, field.channels)
        arrays[name] = field.select(decoded[picture])
    return arrays


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomResizedCrop:
    """Cuts a random box from pictures while they are decoded, and resizes it.

    Boxes have the distribution of `train.data.augment.random_resized_crop`, which runs
    on the device and needs pictures of one size. This crop takes pictures of any size.
    Images are resized bilinearly with antialiasing; masks take the nearest pixel.

    Attributes:
      scale: least and largest share of the picture's area.
      ratio: least and largest width / height of the box.
    """

    scale: tuple[float, float] = boxes.SCALE
    ratio: tuple[float, float] = boxes.RATIO

    def draw(
        self, generator: np.random.Generator, height: int, width: int
    ) -> tuple[float, float, float, float]:
        """Draws the (left, top, right, bottom) of a box, in pixels of the picture."""
        sides = boxes.draw_sides(
            generator.uniform, height, width, self.scale, self.ratio, np
        )
        # Rounding must not put the box outside the picture.
        room = max(0.0, height - float(sides[0])), max(0.0, width - float(sides[1]))
        top, left = (float(x) for x in generator.random(2) * room)
        right, bottom = left + float(sides[1]), top + float(sides[0])
        return left, top, min(right, width), min(bottom, height)

    def apply(
        self,
        arrays: Arrays,
        kinds: Mapping[str, str],
        size: tuple[int, int],
        generator: np.random.Generator,
    ) -> Arrays:
        """Cuts the same box from all pictures of an example and resizes it.

        Args:
          arrays: the arrays of the example.
          kinds: the kind of each array, as in `Field`.
          size: (height, width) of the result.
          generator: draws the box.
        """
        height, width = next(
            array.shape[:2] for name, array in arrays.items() if kinds[name] != "label"
        )
        box = self.draw(generator, height, width)

        def crop(array: np.ndarray, kind: str) -> np.ndarray:
            if kind == "label":
                return array
            nearest = kind == "mask"
            by = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
            image = _to_pil(array).resize(size[::-1], by, box)
            return np.asarray(image).reshape(*size, *array.shape[2:])

        return {name: crop(array, kinds[name]) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads stored examples as arrays of one size.

    Attributes:
      fields: the fields to read, by the names that the task knows.
      size: (height, width) of every image and mask.
      fit: how images of other sizes are brought to the size. "crop" scales an image
        until it covers the size and crops the middle; "pad" scales it until it fits and
        fills the rest with zeros, or masks with the ignored label; "stretch" does not
        keep its proportions.
      ignore_label: value of mask pixels without a class.
      random_crop: a random crop that replaces `fit`, or None.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    fit: str
    ignore_label: int = 255
    random_crop: RandomResizedCrop | None = None

    def __call__(
        self,
        example: Mapping[str, Any],
        generator: np.random.Generator | None = None,
    ) -> Arrays:
        """Returns the arrays of one example.

        Args:
          example: the stored example.
          generator: draws the random crop, if there is one.

        Raises:
          ValueError: if there is a random crop but no generator.
        """
        arrays = read_fields(self.fields, example)
        kinds = {name: field.kind for name, field in self.fields.items()}
        if self.random_crop is None:
            return {n: self.fitted(array, kinds[n]) for n, array in arrays.items()}
        if generator is None:
            raise ValueError("a random crop needs a generator")
        return self.random_crop.apply(arrays, kinds, self.size, generator)

    def fitted(self, array: np.ndarray, kind: str) -> np.ndarray:
        """Returns an array, resized to `size` as `fit` says.

        Args:
          array: the array.
          kind: its kind, as in `Field`.
        """
        if kind == "label" or array.shape[:2] == self.size:
            return array
        image = _to_pil(array)
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
    def spec(self) -> Spec:
        """Shape and dtype of each array."""
        return {name: self._spec_of(field) for name, field in self.fields.items()}

    def _spec_of(self, field: Field) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if field.kind == "label":
            return (), np.dtype(np.int32)
        channels = (field.channels,) if field.kind == "image" else ()
        return (*self.size, *channels), np.dtype(np.uint8)

    @property
    def num_bytes(self) -> int:
        """Size of one decoded example in bytes."""
        return sum(
            dtype.itemsize * math.prod(shape) for shape, dtype in self.spec.values()
        )


def _to_pil(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Examples in a fixed order, which are read from disk on demand.

    Attributes:
      name: name of the prepared split.
      records: the TFDS data source, whose images are still encoded.
      reader: decodes the examples.
      cache: folder of decoded arrays.
      rows: the records that belong to this split, in increasing order.
      stored_size: (height, width) in which all images are stored; None if they differ.
    """

    name: str
    records: Any
    reader: Reader
    cache: Path
    rows: range | tuple[int, ...]
    stored_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Size of all decoded examples in bytes."""
        return len(self) * self.reader.num_bytes

    def read(
        self,
        rows: Sequence[int] | range | np.ndarray,
        generators: Sequence[np.random.Generator] | None = None,
    ) -> Arrays:
        """Decodes some examples and stacks them.

        Args:
          rows: numbers of the examples.
          generators: one for each example, if the reader crops at random.

        Returns:
          Arrays whose first axis counts the examples.
        """
        with damage_explained(self.cache.parent):
            records = self.records.__getitems__([self.rows[int(i)] for i in rows])
            examples = [
                self.reader(record, None if generators is None else generators[i])
                for i, record in enumerate(records)
            ]
        return {
            name: np.stack([example[name] for example in examples])
            for name in self.reader.fields
        }

    @property
    def cache_paths(self) -> dict[str, Path]:
        """The cache file of each array, with all records of the prepared split."""
        form = "x".join(map(str, self.reader.size)) + f"-{self.reader.fit}"
        return {
            name: self.cache / f"{self.name}-{field.key}-{form}.npy"
            for name, field in self.reader.fields.items()
        }

    def arrays(self, progress: Progress = silent) -> Arrays:
        """Returns all examples, memory-mapped from a cache that the first call writes.

        Any number of processes may call this at once: one decodes and the others wait.

        Raises:
          UsageError: if the cache cannot be written.
          ValueError: if the reader crops at random.
        """
        if self.reader.random_crop is not None:
            raise ValueError("examples that are cropped at random cannot be cached")
        paths = self.cache_paths
        num_records = len(self.records)
        arrays = open_arrays(paths, self.reader.spec, num_records)
        if arrays is None:
            whole = dataclasses.replace(self, rows=range(num_records))
            at_once = max(1, _BYTES_AT_ONCE // self.reader.num_bytes)
            at_once = min(at_once, _MAX_AT_ONCE)  # stored images may be far larger
            starts = range(0, num_records, at_once)

            def read(start: int) -> Arrays:
                return whole.read(range(start, min(start + at_once, num_records)))

            with progress(f"decoding {self.name}", num_records) as reporter:
                write_arrays(
                    paths,
                    self.reader.spec,
                    num_records,
                    map_threads(read, starts),
                    reporter,
                )
            arrays = open_arrays(paths, self.reader.spec, num_records)
            assert arrays is not None
        found = self.rows
        if isinstance(found, range):  # stays memory-mapped
            return {n: x[found.start : found.stop] for n, x in arrays.items()}
        return {name: array[list(found)] for name, array in arrays.items()}

    def part(self, start: int, stop: int) -> "Split":
        """Returns the examples from `start` up to `stop` as a split."""
        return dataclasses.replace(self, rows=self.rows[start:stop])

    def subset(self, count: int) -> "Split":
        """Returns some of the examples, of each class as many as possible.

        They are drawn at random, but always the same, and are part of each larger
        subset. Without labels they are drawn from all examples alike.

        Args:
          count: number of examples.

        Raises:
          ValueError: if there are not so many.
        """
        if not 0 < count <= len(self):
            raise ValueError(f"count must be from 1 to {len(self)}, got {count}")
        order = np.random.default_rng(0).permutation(len(self))
        labels = self._labels()[order]
        # The place of each example among those of its class, in this order.
        places = np.empty(len(self), int)
        for label in np.unique(labels):
            of_class = labels == label
            places[of_class] = np.arange(of_class.sum())
        chosen = np.sort(order[np.argsort(places, kind="stable")[:count]])
        rows = tuple(self.rows[int(i)] for i in chosen)
        return dataclasses.replace(self, rows=rows)

    def _labels(self) -> np.ndarray:
        """Returns the label of each example; zeros if they have none."""
        fields = [f for f in self.reader.fields.values() if f.kind == "label"]
        if not fields:
            return np.zeros(len(self), np.int32)
        labels = np.empty(len(self), np.int32)
        with damage_explained(self.cache.parent):
            # Many at once, as reading a record alone takes six times as long.
            for start in range(0, len(self), _MAX_AT_ONCE):
                rows = self.rows[start : start + _MAX_AT_ONCE]
                records = self.records.__getitems__(list(rows))
                labels[start : start + len(rows)] = [*map(fields[0].read, records)]
        return labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Splits of examples, with what is needed to normalize and interpret them.

    Attributes:
      name: the name by which it is loaded.
      task: "classification" with the arrays "image" and "label"; "segmentation" with
        "image" and "mask"; or "translation" with "input" and "target".
      splits: the splits by name: "train", and "validation" or "test" or both.
      class_names: names of the classes in the order of their numbers; () for
        translation.
      ignore_label: value of mask pixels without a class, or None.
      colors: RGB colors of the classes, uint8 (classes, 3), or None.
      mean: mean of each channel of the training images, scaled to [0, 1].
      std: standard deviation of each channel, likewise; 1 for a channel that is
        constant.
      class_counts: how often each class occurs in each prepared split, int64. For
        segmentation (256,), the measured pixels of each mask value; for classification
        (classes,), the examples of each class. Empty for translation.
    """

    name: str
    task: str
    splits: Mapping[str, Split]
    class_names: tuple[str, ...] = ()
    ignore_label: int | None = None
    colors: UInt8[np.ndarray, "classes 3"] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_counts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def split(self, name: str) -> Split:
        """Returns a split by its name.

        Raises:
          UsageError: if there is no such split. The message lists all splits.
        """
        if name not in self.splits:
            raise UsageError(
                f"{self.name} has no split {name!r}; it has {', '.join(self.splits)} "
                '(eval_split "validation" holds out a part of train if needed)'
            )
        return self.splits[name]

    def hold_out(self, fraction: float = 0.2) -> "Dataset":
        """Makes a validation split of the last part of the training split.

        Choose settings on this split, so that no choice depends on test images. A
        dataset that already has a validation split is returned unchanged.

        Args:
          fraction: share of the training examples, from 0 to 1.
        """
        if "validation" in self.splits:
            return self
        train = self.split("train")
        n = len(train) - math.ceil(len(train) * fraction)
        parts = {"train": train.part(0, n), "validation": train.part(n, len(train))}
        return dataclasses.replace(self, splits={**self.splits, **parts})


def describe(dataset: Dataset) -> dict[str, Any]:
    """Returns everything but the examples, as JSON values.

    `from_description` of this is enough to use a network that was trained on the
    dataset.
    """
    reader = dataset.split("train").reader
    fields = {name: dataclasses.asdict(f) for name, f in reader.fields.items()}
    for field in fields.values():
        del field["lookup"]  # bytes, which are of no use without examples
    return {
        "name": dataset.name,
        "task": dataset.task,
        "class_names": dataset.class_names,
        "ignore_label": dataset.ignore_label,
        "colors": None if dataset.colors is None else dataset.colors.tolist(),
        "mean": dataset.mean,
        "std": dataset.std,
        "reader": {
            "fields": fields,
            "size": reader.size,
            "fit": reader.fit,
            "ignore_label": reader.ignore_label,
        },
    }


def from_description(described: Mapping[str, Any]) -> Dataset:
    """Returns the dataset of a description from `describe`.

    Its only split is "train", which has no examples.
    """
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
