"""Decoded examples in files that are mapped into memory."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import filelock
import numpy as np

from train.errors import UsageError
from train.progress import Reporter

Spec = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def write_arrays(
    paths: Mapping[str, Path],
    spec: Spec,
    length: int,
    batches: Iterable[Mapping[str, np.ndarray]],
    reporter: Reporter,
) -> None:
    """Writes arrays batch by batch to .npy files, each there when it is whole.

    A lock lets one process write while others wait; what a killed one left is
    overwritten. Files are written, not mapped: on a full disk a write is an error, and
    a mapped page the end of the process.

    Args:
      paths: of the files, in one folder, by the arrays' names.
      spec: shape and dtype of one example in each array.
      length: number of examples.
      batches: the examples in order; not read if another process was faster.
      reporter: counts examples.

    Raises:
      UsageError: if the folder cannot be written, or the disk is full.
    """
    folder = next(iter(paths.values())).parent
    try:
        folder.mkdir(exist_ok=True)
        with filelock.FileLock(folder / ".lock"), contextlib.ExitStack() as stack:
            if all(path.exists() for path in paths.values()):
                return
            files = {}
            for name, path in paths.items():
                shape, dtype = spec[name]
                files[name] = stack.enter_context(_partial(path).open("wb"))
                header = {
                    "shape": (length, *shape),
                    "fortran_order": False,
                    "descr": np.lib.format.dtype_to_descr(dtype),
                }
                np.lib.format.write_array_header_1_0(files[name], header)
            for batch in batches:
                for name, file in files.items():
                    file.write(np.ascontiguousarray(batch[name]).data)
                reporter.advance(len(next(iter(batch.values()))))
            for name, file in files.items():
                file.flush()
                os.fsync(file.fileno())
                _partial(paths[name]).replace(paths[name])
    except OSError as error:
        raise UsageError(
            f"cannot write decoded images to {folder} ({error}): make room or choose "
            "another --data-dir, or read without a cache by --input stream"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_suffix(".part")
