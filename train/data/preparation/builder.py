"""The base of the TFDS builders: checks files, shuffles and writes examples safely.

The builders are `tfds.core.ShardBasedBuilder`s. tensorflow-datasets'
`GeneratorBasedBuilder` would keep up to 1 GB of a split in memory to shuffle it, and
needs TensorFlow for a larger split. Here examples get their names before they are read,
so that they can be written in shuffled order, one shard after another.
"""

import abc
import collections
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import filelock
import tensorflow_datasets as tfds

from train.data.cache import sync_folder
from train.data.images import BadFileError
from train.data.preparation.archives import Source, SourceError, open_source
from train.data.threads import map_threads
from train.errors import UsageError, see
from train.names import composed, is_note, listed, printable
from train.progress import Progress, silent

Example = dict[str, Any]

_SHARD_BYTES = 1 << 26
_SHOWN_FILES = 20
_NAMED_FILES = 2  # of those in a folder that are not used


class Item(NamedTuple):
    """An example that is yet to be read.

    Attributes:
      key: a name that is unique in the split and decides the place on disk.
      make: reads, checks and encodes the example, or raises BadFileError.
      label: the number of its class, if it has one.
      files: the files that it is read from besides that of the key.
    """

    key: str
    make: Callable[[], Example]
    label: int | None = None
    files: tuple[str, ...] = ()


class BadFilesError(UsageError):
    """Raised if files cannot become examples; the message lists the first of them.

    Attributes:
      errors: one error for each file.
    """

    def __init__(self, source: object, errors: Sequence[BadFileError]):
        super().__init__(
            f"{source} has {summarize(errors)}\nrepair or remove them, or set skip_bad "
            "to leave them out" + see("data.md#bad-files")
        )
        self.errors = errors


def summarize(errors: Sequence[BadFileError]) -> str:
    """Says how many files are bad, and lists the first of them.

    >>> from train.data.images import BadFileError
    >>> print(summarize([BadFileError("a.jpg", "empty"), BadFileError("b", "empty")]))
    2 bad files: a.jpg: empty; b: empty
    """
    shown = [str(error) for error in errors[:_SHOWN_FILES]]
    if len(errors) > _SHOWN_FILES:
        shown.append(f"and {len(errors) - _SHOWN_FILES} more")
    if len(shown) > 2:
        shown[0] = f"\n  {shown[0]}"
    joint = "\n  " if len(shown) > 2 else "; "
    return f"{len(errors)} bad file{'s' * (len(errors) > 1)}: {joint.join(shown)}"


class ImageBuilder(  # type: ignore[call-arg]
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """Base of the builders, which prepare and read without TensorFlow.

    Preparing first checks every file and then writes. The folder of the dataset appears
    in one move when everything is written. A lock lets one process prepare the dataset
    while others wait.

    Attributes:
      NEEDS_SOURCE: whether the dataset is prepared from a folder or archive.
      NEEDS_NAME: whether users bring their own data and therefore name the dataset:
        `image_folder/flowers`.
      SHUFFLED: whether examples are stored in the order of the hashes of their keys.
      skipped: errors of the files left out, after preparing with `skip_bad`.
      notes: what else a user should know of the files, after preparing.
    """

    VERSION = tfds.core.Version("1.0.0")
    NEEDS_SOURCE: ClassVar[bool] = True
    NEEDS_NAME: ClassVar[bool] = False
    SHUFFLED: ClassVar[bool] = True

    def __init__(
        self,
        *,
        source: str | os.PathLike | None = None,
        skip_bad: bool = False,
        progress: Progress = silent,
        config: str | tfds.core.BuilderConfig | None = None,
        file_format: str = "array_record",
        **kwargs: Any,
    ):
        """Makes a builder.

        Args:
          source: folder or archive to prepare from; not needed for a prepared dataset.
          skip_bad: whether to leave out files that cannot become examples, which are
            an error otherwise.
          progress: shows how far preparing is.
          config: the user's name for the dataset, with `NEEDS_NAME`.
          file_format: must be array_record, the only format that can be read without
            TensorFlow.
          **kwargs: passed to `tfds.core.DatasetBuilder`: data_dir, version.
        """
        if file_format != "array_record":
            raise UsageError(f"file_format must be array_record, got {file_format!r}")
        self._source_path = None if source is None else Path(source)
        self._skip_bad = skip_bad
        self._progress = progress
        self._items: dict[str, list[Item]] = {}
        self.skipped: list[BadFileError] = []
        self.notes: list[str] = []
        if isinstance(config, str) and self.NEEDS_NAME:
            config = tfds.core.BuilderConfig(name=config)
        super().__init__(config=config, file_format=file_format, **kwargs)

    @abc.abstractmethod
    def _list(self, source: Source) -> dict[str, list[Item]]:
        """Returns the examples of each split, without reading images.

        Files that belong to no example are reported with `self._bad`.
        """

    def _bad(self, file: str, problem: str) -> None:
        """Reports a file that cannot become an example."""
        self.skipped.append(BadFileError(file, problem))

    def _settle(self, source: Source) -> None:
        """Compares what was declared with what the checked files hold.

        What a user should know is added to `notes`.

        Raises:
          SourceError: if they contradict each other.
        """
        del source
        for split, items in self._items.items():
            labels = {item.label for item in items}
            names = self.info.features["label"].names if labels - {None} else ()
            missing = [name for i, name in enumerate(names) if i not in labels]
            if missing:
                self.notes.append(f"no image of {split} is of {listed(missing, 20)}")

    def _name_classes(self, names: Iterable[str]) -> None:
        """Gives the classes their names, in the order of their numbers.

        Raises:
          SourceError: if there is a name that is no text of one line.
        """
        names = [composed(name) for name in names]
        for name in names:
            if name != name.strip() or "\n" in name or name != printable(name):
                raise SourceError(
                    f"the class {name!r} has a name that is not plain text of one "
                    "line: rename it, in UTF-8 and without spaces at its ends"
                )
        self.info.features["label"].names = names

    def _describe(
        self,
        features: dict[str, tfds.features.FeatureConnector],
        homepage: str | None = None,
        citation: str | None = None,
        **metadata: Any,
    ) -> tfds.core.DatasetInfo:
        """Returns the description of the dataset, for `_info`."""
        return _SyncedInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage=homepage,
            citation=citation,
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=not self.SHUFFLED,
        )

    def download_and_prepare(self, **kwargs: Any) -> None:
        """Prepares the dataset from its source, unless it is prepared already.

        Raises:
          UsageError: if the source is missing or wrong.
          BadFilesError: if files are bad and `skip_bad` is not set; names all of them.
        """
        folder = Path(self.data_path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if (folder / "dataset_info.json").exists():
                return
            if folder.exists():
                raise UsageError(f"{folder} is not a prepared dataset: remove it first")
            # This process holds the lock, so nobody is working on these leftovers.
            for left_over in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(left_over)
            if not self.NEEDS_SOURCE:
                self._items = self._list(Source(folder, {}, set(), lambda name: b""))
                self._num_bytes = 0
                self._write(kwargs)
                return
            if self._source_path is None:
                raise UsageError(
                    f"{self.name} is prepared from a folder or archive: give its source"
                )
            with open_source(
                self._source_path, folder.parent, self._progress
            ) as source:
                self._prepare(source, kwargs)

    def _prepare(self, source: Source, kwargs: dict[str, Any]) -> None:
        self.skipped, self.notes = [], []
        items = self._list(source)
        items = dict(sorted(items.items(), key=lambda pair: pair[0] != "train"))
        if self.NEEDS_NAME:
            self._note_unused(source, items)
        self._num_bytes = source.num_bytes
        with self._progress("checking", sum(map(len, items.values()))) as reporter:
            self._items = {
                name: self._checked(split, reporter.advance)
                for name, split in items.items()
            }
        self.skipped.sort(key=lambda error: error.file)
        if self.skipped and not self._skip_bad:
            raise BadFilesError(source.path, self.skipped)
        empty = [name for name, split in self._items.items() if not split]
        if empty or not items:
            raise UsageError(
                f"no example in {' and '.join(empty) or 'any split'} of {source.path}"
                + f": {summarize(self.skipped)}" * bool(self.skipped)
            )
        self._settle(source)
        self._write(kwargs)

    def _write(self, kwargs: dict[str, Any]) -> None:
        with self._progress("writing", sum(map(len, self._items.values()))) as reporter:
            self._advance = reporter.advance
            try:
                super().download_and_prepare(**kwargs)
            except (OSError, RuntimeError) as error:  # array_record raises the latter
                raise UsageError(
                    f"cannot write {self.name} to {self.data_dir} ({error}): make room "
                    "or choose another data_dir"
                ) from error

    def _note_unused(self, source: Source, items: dict[str, list[Item]]) -> None:
        """Notes files that are neither read, nor bad, nor a readme or the like."""
        used = {f for part in items.values() for i in part for f in (i.key, *i.files)}
        bad = {error.file for error in self.skipped}
        bad_folders = tuple(file for file in bad if file.endswith("/"))
        known = used | bad
        unused = [
            name
            for name in source.names
            if name not in known
            and not name.startswith(bad_folders)
            and not is_note(name)
        ]
        by_folder = collections.Counter(map(os.path.dirname, unused))
        shown = [n for n in unused if by_folder[os.path.dirname(n)] <= _NAMED_FILES]
        shown += [
            f"{folder or '.'}/ ({count:,} files)"
            for folder, count in by_folder.items()
            if count > _NAMED_FILES
        ]
        if shown:
            self.notes.append(f"not used: {printable(listed(sorted(shown), 20))}")

    def _checked(self, items: list[Item], advance: Callable[[], None]) -> list[Item]:
        def error_of(item: Item) -> BadFileError | None:
            try:
                item.make()
            except BadFileError as error:
                return error
            return None

        good = []
        for item, error in zip(items, map_threads(error_of, items), strict=True):
            advance()
            if error is None:
                good.append(item)
            else:
                self.skipped.append(error)
        return good

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[str, Example]]]]]:
        del dl_manager
        num_items = sum(map(len, self._items.values()))
        num_shards = math.ceil(self._num_bytes / _SHARD_BYTES) or 1
        per_shard = math.ceil(num_items / num_shards)

        def write(items: Sequence[Item]) -> Iterator[tuple[str, Example]]:
            for item, example in zip(
                items, map_threads(lambda item: item.make(), items), strict=True
            ):
                self._advance()
                yield item.key, example

        shards: dict[str, list[Callable[[], Iterator[tuple[str, Example]]]]] = {}
        for name, items in self._items.items():
            if self.SHUFFLED:
                items = shuffled(items)
            starts = range(0, len(items), per_shard)
            shards[name] = [
                functools.partial(write, items[i : i + per_shard]) for i in starts
            ]
        return shards

    def _log_download_bytes(self) -> None:
        """Prints nothing, unlike the base class, as nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Prints nothing, unlike the base class."""


class _SyncedInfo(tfds.core.DatasetInfo):
    """Description of a dataset, whose files are on disk when it is written.

    It is the last of them, after which the folder gets its name.
    """

    def write_to_directory(self, dataset_info_dir: Any, **kwargs: Any) -> None:
        """Writes the description and waits until all files of the folder are on disk.

        Args:
          dataset_info_dir: folder of the dataset.
          **kwargs: passed to `tfds.core.DatasetInfo.write_to_directory`.
        """
        super().write_to_directory(dataset_info_dir, **kwargs)
        sync_folder(Path(dataset_info_dir))


def shuffled(items: Iterable[Item]) -> list[Item]:
    """Returns items in the order of the hashes of their keys.

    The part of the path that all keys share is left out of the hash, so that an archive
    and the folder inside it give the same order.
    """
    items = list(items)
    folders = {os.path.dirname(item.key) for item in items}
    start = len(os.path.commonpath(folders)) if items else 0

    def place(item: Item) -> bytes:
        name = os.fsencode(item.key[start:].lstrip("/"))
        return hashlib.md5(name, usedforsecurity=False).digest()

    return sorted(items, key=place)
