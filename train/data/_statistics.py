"""What is counted and measured of a dataset once, and kept beside it."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from PIL import Image

from train.data._builder import map_threads
from train.progress import Progress

_FILE = "statistics.json"
_MAX_MEASURED = 60_000
_MAX_LABELS = 1 << 15  # more than any dataset has
_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Counts and measures of one split.

    Attributes:
      num_examples: all examples.
      num_measured: of how many, evenly spread, pixels were looked at.
      heights: (least, greatest) of the images, in pixels.
      widths: likewise.
      mean: per channel of each image field, on the scale from 0 to 1.
      std: likewise the standard deviation over pixels.
      counts: by field of labels, examples of each value; by field of masks, pixels of
        each value.
    """

    num_examples: int
    num_measured: int
    heights: tuple[int, int]
    widths: tuple[int, int]
    mean: dict[str, tuple[float, ...]]
    std: dict[str, tuple[float, ...]]
    counts: dict[str, tuple[int, ...]]


def statistics(
    folder: Path,
    sources: Mapping[str, Any],
    fields: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Statistics]:
    """Statistics of every split, from the dataset's folder or measured now.

    Args:
      folder: of the prepared dataset.
      sources: data source of each split.
      fields: what to read, by `Field.key`.
      progress: shows how far measuring is.
    """
    path = folder / _FILE
    if not path.exists():
        measured = {
            split: dataclasses.asdict(_measure(split, source, fields, progress))
            for split, source in sources.items()
        }
        content = json.dumps(measured)
        # Disks may be full, or shared and read-only: then each run measures anew.
        with (
            contextlib.suppress(OSError),
            filelock.FileLock(path.with_name(".statistics.lock")),
        ):
            partial = path.with_suffix(".part")
            partial.write_text(content)
            partial.replace(path)
    else:
        content = path.read_text()
    return {
        split: Statistics(**values) for split, values in json.loads(content).items()
    }


def _measure(
    split: str, source: Any, fields: Mapping[str, Any], progress: Progress
) -> Statistics:
    num_measured = min(len(source), _MAX_MEASURED)
    rows = np.linspace(0, len(source) - 1, num_measured).round().astype(int).tolist()
    chunks = [rows[i : i + _AT_ONCE] for i in range(0, num_measured, _AT_ONCE)]

    def count(rows: list[int]) -> tuple[dict[str, np.ndarray], set[tuple[int, int]]]:
        histograms: dict[str, np.ndarray] = {}
        sizes: set[tuple[int, int]] = set()
        for example in source.__getitems__(rows):  # one at a time: photos may be large
            for key, field in fields.items():
                array = field.read(example)
                histograms[key] = histograms.get(key, 0) + _histogram(array)
                if array.ndim:
                    sizes.add(array.shape[:2])
        return histograms, sizes

    histograms: dict[str, np.ndarray] = {}
    sizes: set[tuple[int, int]] = set()
    with progress(f"measuring {split}", num_measured) as reporter:
        for chunk, (counted, found) in zip(
            chunks, map_threads(count, chunks), strict=True
        ):
            reporter.advance(len(chunk))
            sizes |= found
            for key, histogram in counted.items():
                histograms[key] = histograms.get(key, 0) + histogram
    images = {
        k: _moments(h) for k, h in histograms.items() if fields[k].kind == "image"
    }
    heights, widths = zip(*sizes, strict=True)
    return Statistics(
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


def _histogram(array: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel: (channels, values)."""
    if array.ndim:
        image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        return np.reshape(image.histogram(), (-1, 256))
    # Below 0 there is no label, as test images of the catalogue may have none.
    labels = array[None]
    return np.bincount(labels[labels >= 0], minlength=_MAX_LABELS)[None]


def _moments(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of values from 0 to 1, by channel."""
    values = np.arange(histogram.shape[1]) / 255
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return tuple(mean.tolist()), tuple(std.tolist())
