"""Decoded examples in .npy files, which are mapped into memory to read them.

A checksum of the examples follows them in each file. Who reads the file with NumPy does
not see it.
"""

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from train.errors import UsageError, see
from train.progress import Reporter

Spec = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and dtype of one example in each array."""

_CHECKSUM_BYTES = 4


def lock(folder: Path) -> filelock.BaseFileLock:
    """Returns a lock that one process at a time holds to write into the folder.

    Creates the folder if there is none.

    Raises:
      OSError: if the folder cannot be created.
    """
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(folder / ".lock")


def open_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray | None:
    """Maps a .npy file into memory.

    Returns:
      The array; None if the file is missing, damaged, or holds another array. All of
      it is read once for the checksum, at some gigabytes per second.
    """
    header = _header(shape, dtype)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(header)) != header:
                return None
    except OSError:
        return None
    num_bytes = math.prod(shape) * dtype.itemsize
    if size != len(header) + num_bytes + _CHECKSUM_BYTES:
        return None
    stored = np.memmap(path, np.uint8, "r", len(header))
    if _as_bytes(zlib.crc32(stored[:num_bytes].data)) != stored[num_bytes:].tobytes():
        return None
    return np.memmap(path, dtype, "r", len(header), shape)


def _as_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")


def open_arrays(
    paths: Mapping[str, Path], spec: Spec, length: int
) -> dict[str, np.ndarray] | None:
    """Maps the arrays of all examples into memory; None if one is not there.

    Args:
      paths: the file of each array.
      spec: shape and dtype of one example in each array.
      length: number of examples.
    """
    arrays = {}
    for name, path in paths.items():
        shape, dtype = spec[name]
        array = open_array(path, (length, *shape), dtype)
        if array is None:
            return None
        arrays[name] = array
    return arrays


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, which appears under its name when it is complete and on disk.

    Raises:
      OSError: if it cannot be written; nothing is left of it then.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the files of a folder, and their names, are on disk.

    Raises:
      OSError: if they cannot be written.
    """
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Returns the beginning of a .npy file."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"shape": shape, "fortran_order": False, "descr": descr}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


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
        self._checksums = dict.fromkeys(paths, 0)
        try:
            for name, path in paths.items():
                shape, dtype = spec[name]
                self._files[name] = _partial(path).open("wb")
                self._files[name].write(_header((length, *shape), dtype))
        except OSError:
            self.discard()
            raise

    def write(self, batch: Mapping[str, np.ndarray]) -> None:
        """Appends the next examples.

        Raises:
          OSError: if the disk is full.
        """
        for name, file in self._files.items():
            content = np.ascontiguousarray(batch[name]).data
            file.write(content)
            self._checksums[name] = zlib.crc32(content, self._checksums[name])

    def commit(self) -> None:
        """Gives the files their names, when all examples have been written.

        Raises:
          OSError: if the disk is full.
        """
        for name, file in self._files.items():
            with file:
                file.write(_as_bytes(self._checksums[name]))
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

    One process writes while others wait for it. Files that are damaged or hold other
    arrays are replaced.

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
            if open_arrays(paths, spec, length) is not None:
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
            + see("data.md#two-loaders")
        ) from error


def _partial(path: Path) -> Path:
    return path.with_suffix(".part")
