"""Statistics of a dataset, which are measured once and kept beside it."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from PIL import Image

from train.data.cache import ArrayWriter, lock, open_arrays, write_whole
from train.data.dataset import (
    Arrays,
    Field,
    Reader,
    Split,
    damage_explained,
    read_fields,
)
from train.data.threads import map_threads
from train.progress import Progress

_FILE = "statistics.json"
_MAX_MEASURED = 60_000
_MAX_LABELS = 1 << 15  # more than any dataset has
_AT_ONCE = 16
_BYTES_AT_ONCE = 1 << 22

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitStatistics:
    """Statistics of one split.

    Attributes:
      num_examples: number of all examples.
      num_measured: number of examples, evenly spread, whose pixels were measured.
      heights: (least, greatest) height of the images in pixels.
      widths: (least, greatest) width of the images in pixels.
      mean: mean of each channel, scaled to [0, 1], by image field.
      std: standard deviation of each channel over all pixels, likewise.
      counts: by field of labels, the number of examples of each value; by field of
        masks, the number of pixels of each value.
    """

    num_examples: int
    num_measured: int
    heights: Size
    widths: Size
    mean: dict[str, tuple[float, ...]]
    std: dict[str, tuple[float, ...]]
    counts: dict[str, tuple[int, ...]]

    @property
    def common_size(self) -> Size | None:
        """(height, width) of the images, or None if they differ."""
        if len(set(self.heights)) > 1 or len(set(self.widths)) > 1:
            return None
        return self.heights[0], self.widths[0]


class CacheRequest(NamedTuple):
    """Decoded arrays to write to the cache while a split is measured.

    Attributes:
      split: the split, with the reader that decodes it.
      if_uniform: whether to write only if all images of the split have the reader's
        size.
    """

    split: Split
    if_uniform: bool


def measure(
    folder: Path,
    identity: str,
    sources: Mapping[str, Any],
    fields: Mapping[str, Field],
    progress: Progress,
    requests: Sequence[CacheRequest] = (),
) -> dict[str, SplitStatistics]:
    """Returns the statistics of every split, read from the folder or measured now.

    Measuring decodes images. If decoded images are to be cached as well, one pass over
    the records does both. The statistics do not depend on it: they are measured before
    images are brought to the size of the cache, and of a large split only an evenly
    spread sample is measured. Errors in writing the cache are ignored here, as
    `Split.arrays` tries again and explains them.

    Args:
      folder: folder of the prepared dataset.
      identity: tells the dataset from others; statistics of others are not taken.
      sources: data source of each split.
      fields: the fields to read, by `Field.key`.
      progress: shows how far measuring is.
      requests: what to write to the cache if the splits are measured now.
    """
    path = folder / _FILE
    identity = f"{identity}; {', '.join(sorted(fields))}"
    with contextlib.ExitStack() as stack:
        kept = _read(path, identity)
        if kept is None and requests:
            try:
                # Another process may be doing the same, and is waited for.
                stack.enter_context(lock(requests[0].split.cache))
                kept = _read(path, identity)
            except OSError:
                requests = ()
        if kept is not None:
            return kept
        cache = _CacheWriter(requests)
        stack.callback(cache.close)
        with damage_explained(folder):
            found = {
                name: _measure_split(name, source, fields, progress, cache)
                for name, source in sources.items()
            }
        splits = json.loads(
            json.dumps({name: dataclasses.asdict(x) for name, x in found.items()})
        )
        content = {"digest": _digest(identity, splits), "splits": splits}
        # Disks may be full, or shared and read-only: then each run measures anew.
        with (
            contextlib.suppress(OSError),
            filelock.FileLock(path.with_name(".statistics.lock")),
        ):
            write_whole(path, json.dumps(content).encode())
        return {name: SplitStatistics(**values) for name, values in splits.items()}


def _read(path: Path, identity: str) -> dict[str, SplitStatistics] | None:
    """Reads statistics; None if they are missing, damaged or of another dataset."""
    try:
        content = json.loads(path.read_bytes())
        if content["digest"] != _digest(identity, content["splits"]):
            return None
        return {
            split: SplitStatistics(**values)
            for split, values in content["splits"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _digest(identity: str, splits: Any) -> str:
    """Returns a digest by which changed statistics, or others', are noticed."""
    text = f"{identity}\n{json.dumps(splits)}"
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _is_cached(split: Split) -> bool:
    paths, spec = split.cache_paths, split.reader.spec
    return open_arrays(paths, spec, len(split.records)) is not None


class _CacheWriter:
    """Writes what is requested during the pass that measures.

    It gives up and removes incomplete files if one cannot be written, or if images
    differ in size that were assumed to have one.

    Attributes:
      readers: bring the arrays of the present split to the sizes of the cache.
    """

    def __init__(self, requests: Sequence[CacheRequest]):
        self._requests = [
            request for request in requests if not _is_cached(request.split)
        ]
        self._open: list[CacheRequest] = []
        self._writers: list[ArrayWriter] = []
        self.readers: list[Reader] = []

    def open(self, split: str) -> None:
        """Creates the files of a split."""
        self._open = [r for r in self._requests if r.split.name == split]
        self._writers = []
        try:
            for request in self._open:
                paths, spec = request.split.cache_paths, request.split.reader.spec
                self._writers.append(
                    ArrayWriter(paths, spec, len(request.split.records))
                )
        except OSError:
            self._give_up()
        self.readers = [request.split.reader for request in self._open]

    def write(self, batches: Sequence[Arrays], sizes: set[Size]) -> None:
        """Appends a batch to each array, unless it has given up.

        Args:
          batches: the next examples, for each of `readers`.
          sizes: (height, width) of all images measured in this split.
        """
        differ = [
            r for r in self._open if r.if_uniform and sizes - {r.split.reader.size}
        ]
        try:
            if differ:
                self._give_up()
            for writer, batch in zip(self._writers, batches, strict=False):
                writer.write(batch)
        except OSError:
            self._give_up()

    def commit(self) -> None:
        """Gives the files of the split their names."""
        try:
            for writer in self._writers:
                writer.commit()
        except OSError:
            self._give_up()

    def close(self) -> None:
        """Closes the files; incomplete ones stay as they are."""
        for writer in self._writers:
            writer.close()

    def _give_up(self) -> None:
        for writer in self._writers:
            writer.discard()
        self._requests, self._open, self._writers, self.readers = [], [], [], []


class _Chunk(NamedTuple):
    """What a few records hold."""

    histograms: dict[str, np.ndarray]
    sizes: set[Size]
    batches: list[Arrays]  # one for each reader of the cache


def _measure_split(
    name: str,
    source: Any,
    fields: Mapping[str, Field],
    progress: Progress,
    cache: _CacheWriter,
) -> SplitStatistics:
    num_measured = min(len(source), _MAX_MEASURED)
    rows = np.linspace(0, len(source) - 1, num_measured).round().astype(int).tolist()
    measured = frozenset(rows)
    cache.open(name)
    at_once = _AT_ONCE
    if cache.readers:
        rows = list(range(len(source)))
        num_bytes = sum(reader.num_bytes for reader in cache.readers)
        at_once = max(1, min(_AT_ONCE, _BYTES_AT_ONCE // num_bytes))
    chunks = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]

    def read(rows: Sequence[int]) -> _Chunk:
        readers = cache.readers
        if not readers:  # the cache was given up
            rows = [row for row in rows if row in measured]
        chunk = _Chunk({}, set(), [])
        cached: list[list[Arrays]] = [[] for _ in readers]
        records = source.__getitems__(rows) if rows else []
        for row, record in zip(rows, records, strict=True):
            # Stored images may be large: one at a time is decoded.
            arrays = read_fields(fields, record)
            if row in measured:
                _count(arrays, chunk)
            for reader, examples in zip(readers, cached, strict=True):
                examples.append(_fit(arrays, reader))
        for examples in cached:
            batch = {key: np.stack([x[key] for x in examples]) for key in examples[0]}
            chunk.batches.append(batch)
        return chunk

    histograms: dict[str, np.ndarray] = {}
    sizes: set[Size] = set()
    what = f"{'decoding' if cache.readers else 'measuring'} {name}"
    with progress(what, len(rows)) as reporter:
        for taken, chunk in zip(chunks, map_threads(read, chunks), strict=True):
            reporter.advance(len(taken))
            sizes |= chunk.sizes
            for key, histogram in chunk.histograms.items():
                histograms[key] = histograms.get(key, 0) + histogram
            cache.write(chunk.batches, sizes)
    cache.commit()
    images = {
        k: _moments(h) for k, h in histograms.items() if fields[k].kind == "image"
    }
    heights, widths = zip(*sizes, strict=True)
    return SplitStatistics(
        num_examples=len(source),
        num_measured=num_measured,
        heights=(min(heights), max(heights)),
        widths=(min(widths), max(widths)),
        mean={key: mean for key, (mean, _) in images.items()},
        std={key: std for key, (_, std) in images.items()},
        counts={
            key: tuple(np.trim_zeros(histogram[0], "b").tolist())
            for key, histogram in histograms.items()
            if fields[key].kind != "image"
        },
    )


def _fit(arrays: Arrays, reader: Reader) -> Arrays:
    return {
        name: reader.fitted(arrays[field.key], field.kind)
        for name, field in reader.fields.items()
    }


def _count(arrays: Arrays, chunk: _Chunk) -> None:
    """Adds an example to the histograms and sizes of a chunk."""
    for key, array in arrays.items():
        chunk.histograms[key] = chunk.histograms.get(key, 0) + _histogram(array)
        if array.ndim:
            chunk.sizes.add(array.shape[:2])


def _histogram(array: np.ndarray) -> np.ndarray:
    """Counts how often each value occurs in each channel: (channels, values)."""
    if array.ndim:
        image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        return np.reshape(image.histogram(), (-1, 256))
    # Test images of the catalogue may have labels below 0, which mean none.
    labels = array[None]
    return np.bincount(labels[labels >= 0], minlength=_MAX_LABELS)[None]


def _moments(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, scaled to [0, 1]."""
    values = np.arange(histogram.shape[1]) / 255
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return tuple(mean.tolist()), tuple(std.tolist())
