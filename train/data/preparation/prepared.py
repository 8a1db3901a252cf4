"""Opens prepared datasets, and determines their fields and the tasks they serve."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from train.data.dataset import Dataset, Field, Reader, Split
from train.data.preparation.catalogue import command, find_or_prepare
from train.data.preparation.measure import CacheRequest, Size, SplitStatistics, measure
from train.data.threads import map_threads
from train.errors import UsageError, see
from train.names import listed, printable
from train.progress import Progress, silent

_FIT = {"classification": "crop", "segmentation": "pad", "translation": "stretch"}
_SPLIT_ORDER = ("train", "validation", "test")

# The classes of Cityscapes that are trained on, by their values in its label images.
_CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_IGNORED = 255


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A dataset on disk.

    Attributes:
      name: name of the dataset.
      folder: folder that holds it.
      info: the description by TFDS.
      sources: the TFDS data source of each split, whose images are still encoded.
      tasks: the fields of an example by name, for each task that the dataset serves.
    """

    name: str
    folder: Path
    info: tfds.core.DatasetInfo
    sources: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Field]]

    def fields(self, task: str | None) -> Mapping[str, Field]:
        """Returns the fields of a task, or of the first task that the dataset serves.

        Raises:
          UsageError: if the dataset does not serve the task.
        """
        if not self.tasks:
            raise UsageError(
                f"{self.name} serves no task here: it holds "
                f"{', '.join(sorted(self.info.features))}"
            )
        task = task or next(iter(self.tasks))
        if task not in self.tasks:
            raise UsageError(
                f"{self.name} is for {' and '.join(self.tasks)}, not for {task}"
            )
        return self.tasks[task]

    def statistics(
        self, progress: Progress = silent, requests: Sequence[CacheRequest] = ()
    ) -> dict[str, SplitStatistics]:
        """Returns the statistics of every split, which the first call measures.

        Args:
          progress: shows how far measuring is.
          requests: decoded arrays to write to the cache in the same pass.
        """
        fields = {f.key: f for task in self.tasks.values() for f in task.values()}
        identity = "; ".join(
            f"{s.name}: {s.num_examples} examples, {int(s.num_bytes)} bytes"
            for s in self.info.splits.values()
        )
        return measure(self.folder, identity, self.sources, fields, progress, requests)

    def reader(self, task: str, size: Size) -> Reader:
        """Returns a reader of the examples of a task, with images of one size."""
        ignore_label = self.ignore_label
        return Reader(
            fields=self.fields(task),
            size=size,
            fit=_FIT[task],
            ignore_label=_IGNORED if ignore_label is None else ignore_label,
        )

    def split(self, name: str, reader: Reader, stored_size: Size | None) -> Split:
        """Returns all examples of a split."""
        records = self.sources[name]
        return Split(
            name=name,
            records=records,
            reader=reader,
            cache=self.folder / "cache",
            rows=range(len(records)),
            stored_size=stored_size,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; () if there are none."""
        fields = self.fields(None).values()
        if any(field.lookup for field in fields):
            return tuple(_CITYSCAPES.values())
        names = (getattr(self.info.features[f.feature], "names", None) for f in fields)
        return tuple(next(filter(None, names), ()))

    @property
    def ignore_label(self) -> int | None:
        """Value of mask pixels without a class, or None."""
        if any(field.lookup for field in self.fields(None).values()):
            return _IGNORED
        return (self.info.metadata or {}).get("ignore_label")

    @property
    def colors(self) -> np.ndarray | None:
        """RGB colors of the classes, uint8 (classes, 3); None if there are none."""
        colors = (self.info.metadata or {}).get("colors")
        return None if colors is None else np.asarray(colors, np.uint8)


def open_prepared(
    name: str,
    *,
    direction: str = "AtoB",
    data_dir: Path | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Opens a prepared dataset, and prepares it first if that needs no source.

    The arguments are those of `load`.

    Raises:
      UsageError: if the dataset is not known or not prepared, is damaged, or was
        prepared in a format that only TensorFlow reads.
    """
    folder = find_or_prepare(name, data_dir, progress)
    try:
        prepared = _open(name, folder, direction)
        _check(prepared)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # TFDS takes what the files say without checking it
        text = printable(" ".join(f"{error!r}".split()))[:200]
        raise UsageError(
            f"{folder} is no whole dataset ({text}): remove it and prepare {name} again"
        ) from error
    return prepared


def _check(prepared: Prepared) -> None:
    """Compares the files of a dataset with its description.

    Raises:
      ValueError: if they contradict each other. Reading may raise other errors.
    """
    files = [
        (Path(file), count)
        for split in prepared.info.splits.values()
        for file, count in zip(split.filepaths, split.shard_lengths, strict=True)
    ]
    if not files:
        raise ValueError("it has no splits")
    missing = [file.name for file, _ in files if not file.is_file()]
    if missing:
        raise ValueError(f"missing: {listed(missing)}")
    for (file, count), found in zip(files, map_threads(_count, files), strict=True):
        if found != count:
            raise ValueError(f"{file.name} is damaged")
    if not prepared.tasks:
        return
    label, colors = prepared.ignore_label, prepared.colors
    if label is not None and not (isinstance(label, int) and 0 <= label <= 255):
        raise ValueError(f"metadata.json says ignore_label {label!r}")
    if colors is not None and colors.shape != (len(prepared.class_names), 3):
        raise ValueError("metadata.json has not one color for each class")
    fields = {f.key: f for task in prepared.tasks.values() for f in task.values()}
    for source in filter(len, prepared.sources.values()):
        (record,) = source.__getitems__([0])
        for field in fields.values():
            if field.kind == "label":
                int(record[field.feature])
            elif min(field.stored_size(record)) < 1 or field.channels not in (1, 3):
                raise ValueError(f"features.json has no {field.feature} to read")


def _count(shard: tuple[Path, int]) -> int:
    """Returns how many examples a file holds; -1 if it is damaged."""
    reader = ArrayRecordReader(str(shard[0]))
    count = reader.num_records()
    try:
        reader.close()
    except RuntimeError:
        return -1
    return int(count)


def _open(name: str, folder: Path, direction: str) -> Prepared:
    builder = tfds.builder_from_directory(folder)
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UsageError(
            f"{folder} was prepared as {found and found.value}, which only TensorFlow "
            f"reads: move it away and prepare it as array_record, {command(name)}"
            + see("data.md#what-can-be-prepared")
        )
    encoded = {
        feature: tfds.decode.SkipDecoding()
        for feature, kind in builder.info.features.items()
        if isinstance(kind, tfds.features.Image)
    }
    splits = sorted(builder.info.splits, key=_place_of)
    return Prepared(
        name=name,
        folder=folder,
        info=builder.info,
        sources={s: builder.as_data_source(s, decoders=encoded) for s in splits},
        tasks=_tasks(name, dict(builder.info.features.items()), direction),
    )


def _place_of(split: str) -> tuple[int, str]:
    known = split in _SPLIT_ORDER
    return (_SPLIT_ORDER.index(split) if known else len(_SPLIT_ORDER)), split


def load(
    name: str,
    *,
    task: str | None = None,
    size: Size | None = None,
    direction: str = "AtoB",
    data_dir: Path | None = None,
    progress: Progress = silent,
    cache: Collection[tuple[str, Size | None]] = (),
    max_cache_bytes: float = math.inf,
) -> Dataset:
    """Loads a prepared dataset, and prepares it first if that needs no source.

    Args:
      name: name of the dataset: `digits`, `image_folder/flowers`, `cifar10`.
      task: "classification", "segmentation" or "translation"; the first that the
        dataset serves if unset.
      size: (height, width) of images in pixels; may be unset if all have the same
        size. `Reader.fit` says how images of other sizes are resized.
      direction: "AtoB" translates the left half of a pair into the right, "BtoA" the
        right into the left.
      data_dir: folder of prepared datasets; the default of TFDS if unset.
      progress: shows how far the first call is.
      cache: splits whose decoded examples will be needed in memory, each with the size
        of its images, or None for the stored size. The first call decodes all images to
        measure them, and writes these splits to the cache in the same pass. If there is
        no validation split, "validation" stands for "train", from which it will be held
        out.
      max_cache_bytes: if the decoded examples would take more, no cache is written.

    Raises:
      UsageError: if the dataset is not known or not prepared, has no training split or
        does not serve the task, or if its images differ in size and no size is given.
    """
    found = open_prepared(
        name, direction=direction, data_dir=data_dir, progress=progress
    )
    if "train" not in found.sources:
        raise UsageError(
            f"{name} has nothing to train on; it has {', '.join(found.sources)}"
        )
    fields = found.fields(task)
    task = task or next(iter(found.tasks))
    requests = _requests(found, task, cache, max_cache_bytes)
    measured = found.statistics(progress, requests)
    reader = found.reader(task, size or _common_size(name, measured))
    splits = {
        split: found.split(split, reader, measured[split].common_size)
        for split in found.sources
        # Test images of the catalogue may come without labels.
        if all(map(any, measured[split].counts.values()))
    }
    _check_classes(name, found, fields, measured["train"])
    image = next(field.key for field in fields.values() if field.kind == "image")
    return Dataset(
        name=name,
        task=task,
        splits=splits,
        class_names=found.class_names,
        ignore_label=found.ignore_label,
        colors=found.colors,
        mean=tuple(measured["train"].mean[image]),
        std=tuple(std or 1.0 for std in measured["train"].std[image]),
        class_counts=_class_counts(fields, measured, len(found.class_names)),
    )


def _check_classes(
    name: str,
    found: Prepared,
    fields: Mapping[str, Field],
    measured: SplitStatistics,
) -> None:
    """Refuses masks in which no pixel has a class."""
    for field in fields.values():
        if field.kind == "mask":
            counts = measured.counts[field.key][: len(found.class_names)]
            if not any(counts):
                raise UsageError(
                    f"no training mask of {name} has a pixel of one of its "
                    f"{len(found.class_names)} classes: prepare it again from masks "
                    "whose values are the numbers of the classes"
                )


def _requests(
    found: Prepared,
    task: str,
    cache: Collection[tuple[str, Size | None]],
    max_bytes: float,
) -> list[CacheRequest]:
    """Chooses what to write to the cache while images are measured."""
    if not cache:
        return []
    image = next(f for f in found.fields(task).values() if f.kind == "image")
    stored = image.stored_size(found.sources["train"].__getitems__([0])[0])
    requests = {}
    for split, size in cache:
        held_out = split == "validation" and split not in found.sources
        name = "train" if held_out else split
        if name in found.sources:
            part = found.split(name, found.reader(task, size or stored), None)
            paths = tuple(part.cache_paths.values())
            requests[paths] = CacheRequest(part, if_uniform=size is None)
    num_bytes = sum(request.split.num_bytes for request in requests.values())
    return list(requests.values()) if num_bytes <= max_bytes else []


def _class_counts(
    fields: Mapping[str, Field], measured: Mapping[str, SplitStatistics], classes: int
) -> dict[str, np.ndarray]:
    """Returns `Dataset.class_counts`."""
    for field in fields.values():
        if field.kind != "image":
            length = 256 if field.kind == "mask" else classes
            return {
                split: _padded(of_split.counts[field.key], length)
                for split, of_split in measured.items()
            }
    return {}


def _padded(counts: Sequence[int], length: int) -> np.ndarray:
    array = np.zeros(max(length, len(counts)), np.int64)
    array[: len(counts)] = counts
    return array[:length]


def _tasks(
    name: str, features: Mapping[str, Any], direction: str
) -> dict[str, dict[str, Field]]:
    """Returns the fields of each task that the features of a dataset serve."""

    def image(feature: str, half: str = "") -> Field:
        channels = features[feature].shape[-1]
        return Field(feature=feature, kind="image", channels=channels, half=half)

    tasks = {}
    feature = features.get("label")
    has_classes = isinstance(feature, tfds.features.ClassLabel) and feature.num_classes
    if {"image", "mask"} <= features.keys():
        mask = Field(feature="mask", kind="mask")
        tasks["segmentation"] = {"image": image("image"), "mask": mask}
    elif has_classes and "image" in features and features["image"].shape[-1] in (1, 3):
        label = Field(feature="label", kind="label")
        tasks["classification"] = {"image": image("image"), "label": label}
    elif name.startswith("cityscapes"):
        lookup = np.full(256, _IGNORED, np.uint8)
        lookup[list(_CITYSCAPES)] = np.arange(len(_CITYSCAPES))
        mask = Field(feature="segmentation_label", kind="mask", lookup=lookup.tobytes())
        tasks["segmentation"] = {"image": image("image_left"), "mask": mask}
    if {"image", "drawing"} <= features.keys():
        tasks["translation"] = {"input": image("drawing"), "target": image("image")}
    if "pair" in features:
        halves = {"AtoB": "ab", "BtoA": "ba"}[direction]
        tasks["translation"] = {
            key: image("pair", half)
            for key, half in zip(("input", "target"), halves, strict=True)
        }
    return tasks


def _common_size(name: str, measured: Mapping[str, SplitStatistics]) -> Size:
    heights = {h for m in measured.values() for h in m.heights}
    widths = {w for m in measured.values() for w in m.widths}
    if len(heights) > 1 or len(widths) > 1:
        raise UsageError(
            f"images of {name} differ in size, from {min(widths)} to {max(widths)} "
            f"pixels wide and from {min(heights)} to {max(heights)} high: set "
            "image_size to bring them to one size"
            + see("data.md#sizes-and-augmentation")
        )
    return heights.pop(), widths.pop()
