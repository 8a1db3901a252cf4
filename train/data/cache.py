"""Decoded examples in .npy files, which are mapped into memory to read them."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from train.errors import UsageError
from train.progress import Reporter

Spec = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and dtype of one example in each array."""


def lock(folder: Path) -> filelock.BaseFileLock:
    """Returns a lock that one process at a time holds to write into the folder.

    Creates the folder if there is none.

    Raises:
      OSError: if the folder cannot be created.
    """
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(folder / ".lock")


class ArrayWriter:
    """Writes arrays to .npy files batch by batch.

    A file gets its name when it is complete; until then it has the suffix `.part`. What
    a killed process left is overwritten. Files are written, not mapped: on a full disk,
    a write raises an error, but a mapped page ends the process.
    """

    def __init__(self, paths: Mapping[str, Path], spec: Spec, length: int):
        """Creates the files.

        Args:
          paths: the file of each array, all in one folder.
          spec: shape and dtype of one example in each array.
          length: number of examples.

        Raises:
          OSError: if a file cannot be written.
        """
        self._paths = paths
        self._files: dict[str, BinaryIO] = {}
        try:
            for name, path in paths.items():
                shape, dtype = spec[name]
                header = {
                    "shape": (length, *shape),
                    "fortran_order": False,
                    "descr": np.lib.format.dtype_to_descr(dtype),
                }
                self._files[name] = _partial(path).open("wb")
                np.lib.format.write_array_header_1_0(self._files[name], header)
        except OSError:
            self.discard()
            raise

    def write(self, batch: Mapping[str, np.ndarray]) -> None:
        """Appends the next examples.

        Raises:
          OSError: if the disk is full.
        """
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(batch[name]).data)

    def commit(self) -> None:
        """Gives the files their names, when all examples have been written.

        Raises:
          OSError: if the disk is full.
        """
        for name, file in self._files.items():
            with file:
                file.flush()
                os.fsync(file.fileno())
            _partial(self._paths[name]).replace(self._paths[name])

    def close(self) -> None:
        """Closes the files; incomplete ones stay as they are."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()  # writes what is left in its buffer, and may fail

    def discard(self) -> None:
        """Removes incomplete files."""
        self.close()
        for name in self._files:
            with contextlib.suppress(OSError):
                _partial(self._paths[name]).unlink(missing_ok=True)


def write_arrays(
    paths: Mapping[str, Path],
    spec: Spec,
    length: int,
    batches: Iterable[Mapping[str, np.ndarray]],
    reporter: Reporter,
) -> None:
    """Writes arrays to .npy files, unless another process has done so.

    One process writes while others wait for it.

    Args:
      paths: the file of each array, all in one folder.
      spec: shape and dtype of one example in each array.
      length: number of examples.
      batches: the examples in order; not read if the files are there already.
      reporter: counts examples.

    Raises:
      UsageError: if the folder cannot be written, or the disk is full.
    """
    folder = next(iter(paths.values())).parent
    try:
        with lock(folder):
            if all(path.exists() for path in paths.values()):
                return
            writer = ArrayWriter(paths, spec, length)
            try:
                for batch in batches:
                    writer.write(batch)
                    reporter.advance(len(next(iter(batch.values()))))
                writer.commit()
            except OSError:
                writer.discard()
                raise
            finally:
                writer.close()
    except OSError as error:
        raise UsageError(
            f"cannot write decoded images to {folder} ({error}): make room, choose "
            'another data_dir, or set loader to "grain", which needs no cache'
        ) from error


def _partial(path: Path) -> Path:
    return path.with_suffix(".part")
