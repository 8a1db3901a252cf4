"""Reads the files of a folder, a tar or a zip archive in place.

No member of an archive is ever written to a path. A compressed tar is unpacked to one
temporary file without a name, which is gone however the process ends.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from train.errors import UsageError
from train.names import composed
from train.progress import Progress

_MAX_FILE_BYTES = 1 << 28
# Photos do not compress a hundredfold; an archive made to fill a disk does.
_MAX_EXPANSION = 100
_MIN_UNPACKED_LIMIT = 1 << 26
_CHUNK = 1 << 20
_MEGA = 10**6
_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# The first bytes of kinds that are not read, and their names.
_OTHER_KINDS = {
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress",
    b"\x5d\x00\x00": "lzma",
    b"MSCF": "cab",
    b"\x89HDF": "HDF5",
    b"PAR1": "parquet",
    b"SQLite": "SQLite",
}
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    NotImplementedError,  # a zip compression that Python does not know
)


class SourceError(UsageError):
    """Raised if a folder or archive cannot be used at all."""


class Source:
    """Files by their relative names, which have forward slashes.

    Names are in the composed form of Unicode, whichever form the source has.

    Attributes:
      path: the folder or archive.
      names: sorted names of all files that are not hidden.
      folders: names of all folders that are not hidden, also of empty ones.
      num_bytes: size of all files together, in bytes.
    """

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, int],
        folders: set[str],
        read: Callable[[str], bytes],
    ):
        self.path = path
        shown = sorted(filter(_shown, sizes))
        self._given = {composed(name): name for name in shown}
        if len(self._given) < len(shown):
            twice = next(n for n in shown if self._given[composed(n)] != n)
            raise SourceError(
                f"{path} holds two files {composed(twice)}, whose names differ only in "
                "how accents are stored: rename one"
            )
        self.names = tuple(sorted(self._given))
        self._sizes = {name: sizes[self._given[name]] for name in self.names}
        parents = {str(p) for name in self.names for p in PurePosixPath(name).parents}
        folders = {composed(name) for name in folders} | parents
        self.folders = {name for name in folders if _shown(name)} - {"."}
        self.num_bytes = sum(self._sizes.values())
        self._read = read

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          ValueError: if the file has more than 2**28 bytes, which no image has, or is
            damaged in the archive.
        """
        if self._sizes[name] > _MAX_FILE_BYTES:
            raise ValueError(
                f"{self._sizes[name]:,} bytes; expected at most {_MAX_FILE_BYTES:,}"
            )
        try:
            return self._read(self._given[name])
        except _DAMAGED as error:
            raise ValueError(f"cannot be unpacked ({error})") from error


def _shown(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1] not in ("Thumbs.db", "desktop.ini")


@contextlib.contextmanager
def open_source(path: Path, scratch: Path, progress: Progress) -> Iterator[Source]:
    """Opens a folder, a zip, or a tar (plain, or compressed by gzip, bzip2 or xz).

    Args:
      path: the folder or archive.
      scratch: an existing folder with room for the content of a compressed tar.
      progress: shows how far unpacking is.

    Raises:
      SourceError: if the source does not exist or is damaged, or if a member of an
        archive is a link or lies outside its folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                source = _open_folder(path)
            elif zipfile.is_zipfile(path):
                source = _open_zip(path, stack.enter_context(zipfile.ZipFile(path)))
            else:
                file = stack.enter_context(path.open("rb"))
                source = _open_tar(
                    path, _unpacked(file, path, scratch, stack, progress)
                )
        except _DAMAGED as error:
            raise SourceError(_not_read(path, error)) from error
        except FileNotFoundError:
            raise SourceError(f"there is no folder or archive {path}") from None
        yield source


def _not_read(path: Path, error: Exception) -> str:
    """Says why a file is no archive, and what to do."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            return (
                f"{path} is a {kind} file, which is not read: unpack it and give its "
                "folder, or pack that as zip or tar"
            )
    return (
        f"{path} is not a whole tar or zip archive ({error}): download it again, or "
        "unpack it and give its folder if it is of another kind"
    )


def _open_folder(path: Path) -> Source:
    sizes, folders = {}, set()
    # For each folder, its real path and those of all folders above it.
    above: dict[str, set[str]] = {}
    # In a folder, the user made the links; they are common on shared disks.
    for folder, subfolders, files in os.walk(path, onerror=_fail, followlinks=True):
        real = os.path.realpath(folder)
        parents = above.get(os.path.dirname(folder), set())
        if real in parents:  # a link to a folder that it lies in
            subfolders.clear()
            continue
        above[folder] = parents | {real}
        folders.add(Path(folder).relative_to(path).as_posix())
        for file in files:
            name = Path(folder, file)
            if name.is_file():  # and not a pipe, or a link to nothing
                sizes[name.relative_to(path).as_posix()] = name.stat().st_size
    return Source(path, sizes, folders, lambda name: (path / name).read_bytes())


def _fail(error: OSError) -> NoReturn:
    raise error


def _open_zip(path: Path, archive: zipfile.ZipFile) -> Source:
    members, folders, refused = {}, set(), []
    for member in archive.infolist():
        # Some Windows programs write backslashes.
        name = member.filename.replace("\\", "/").removeprefix("./")
        if stat.S_ISLNK(member.external_attr >> 16) or not _is_inside(name):
            refused.append(name)
        elif name.endswith("/"):
            folders.add(name.rstrip("/"))
        elif member.flag_bits & 1:
            raise SourceError(f"{path} is encrypted: decrypt it first")
        else:
            members[name] = member
    _refuse(path, refused)

    def read(name: str) -> bytes:
        try:
            return archive.read(members[name])
        except OSError as error:  # raised by bz2, and at impossible positions
            raise zipfile.BadZipFile(str(error)) from error

    sizes = {name: member.file_size for name, member in members.items()}
    return Source(path, sizes, folders, read)


def _open_tar(path: Path, file: BinaryIO) -> Source:
    places, folders, refused = {}, set(), []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            plain = member.isreg() and not member.issparse()
            if not _is_inside(name) or not (plain or member.isdir()):
                refused.append(name)
            elif member.isdir():
                folders.add(name)
            else:
                places[name] = (member.offset_data, member.size)
        # tarfile also takes a damaged header for the end.
        end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
        if end != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end after {len(archive.getmembers())} members")
    _refuse(path, refused)

    def read(name: str) -> bytes:
        start, size = places[name]
        return os.pread(file.fileno(), size, start)  # safe in threads

    sizes = {name: size for name, (_, size) in places.items()}
    return Source(path, sizes, folders, read)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts


def _refuse(path: Path, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise SourceError(
            f"{path} is refused: {len(names)} of its members are links or lie outside "
            f"its folder ({shown}); expected plain files and folders only"
        )


def _unpacked(
    file: BinaryIO,
    path: Path,
    scratch: Path,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> BinaryIO:
    """Returns the tar itself, or an uncompressed temporary copy of it.

    In a compressed tar, all bytes before a file must be read to reach the file. An
    uncompressed tar can be read in any order.
    """
    start = file.read(6)
    file.seek(0)
    opener = next((o for magic, o in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        return file
    size = os.fstat(file.fileno()).st_size
    limit = max(_MAX_EXPANSION * size, _MIN_UNPACKED_LIMIT)
    plain = stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
    try:
        with (
            progress(f"unpacking {path.name} (MB)", size // _MEGA) as reporter,
            opener(file) as unpacked,
        ):
            while chunk := unpacked.read(_CHUNK):
                plain.write(chunk)
                reporter.advance(file.tell() // _MEGA - reporter.done)
                if plain.tell() > limit:
                    raise SourceError(
                        f"{path} is refused: it unpacks to more than {_MAX_EXPANSION} "
                        "times its size, which no archive of images does"
                    )
        plain.seek(0, io.SEEK_SET)
    except OSError as error:
        if error.errno is None:  # raised by gzip or bz2, not by the system
            raise tarfile.ReadError(str(error)) from error
        raise SourceError(
            f"cannot unpack {path} to {scratch} ({error}): make room or choose another "
            "data_dir"
        ) from error
    return plain
