"""Finds datasets by name, and prepares them."""

import difflib
import importlib.util
import inspect
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from train.data.preparation.builder import ImageBuilder
from train.data.preparation.builders import BUILDERS
from train.errors import UsageError, see
from train.names import composed, did_you_mean
from train.progress import Progress, silent

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"(?P<builder>\w+)(/(?P<config>\w[\w.+-]*))?")


def default_data_dir() -> Path:
    """Returns the default folder of prepared datasets, which TFDS also uses.

    Raises:
      UsageError: if neither $TFDS_DATA_DIR nor a home folder is set.
    """
    given = os.environ.get("TFDS_DATA_DIR")
    try:
        if given:
            return Path(given).expanduser()
        return Path.home() / "tensorflow_datasets"
    except RuntimeError:
        raise UsageError(
            "this user has no home folder for prepared datasets: set data_dir or "
            "TFDS_DATA_DIR to another folder"
        ) from None


def folder_of(name: str, data_dir: Path | None = None) -> Path | None:
    """Returns the folder of the highest version of a dataset; None if not prepared.

    Raises:
      UsageError: if there is no dataset of this name.
    """
    name = composed(name)
    _parse(name, data_dir)
    found = _folders(data_dir or default_data_dir(), name)
    return max(found, key=_version, default=None)


def _folders(root: Path, names: str) -> list[Path]:
    """Finds folders of datasets, without those that are incomplete or put aside."""
    infos = root.glob(f"{names}/*/dataset_info.json")
    return [i.parent for i in infos if _VERSION.fullmatch(i.parent.name)]


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def prepared(data_dir: Path | None = None) -> list[str]:
    """Returns the names of all prepared datasets."""
    root = data_dir or default_data_dir()
    found = (*_folders(root, "*"), *_folders(root, "*/*"))
    return sorted({folder.parent.relative_to(root).as_posix() for folder in found})


def _parse(name: str, data_dir: Path | None) -> tuple[str, str | None]:
    """Splits a name into builder and config.

    Raises:
      UsageError: if there can be no such dataset; the message lists those that exist.
    """
    name = composed(name)
    match = _NAME.fullmatch(name)
    builder, config = (match["builder"], match["config"]) if match else (name, None)
    own = BUILDERS.get(builder)
    if own is None:
        if match is None or builder not in _of_tfds():
            raise UsageError(
                f"unknown dataset {name!r}; {_guess(name, data_dir)}"
                f"known: {', '.join(map(_shown, BUILDERS))}, "
                "and the names of the TFDS catalogue such as cifar10, cifar100, "
                "imagenet2012, cityscapes/semantic_segmentation"
                + see("data.md#what-can-be-prepared")
            )
    elif own.NEEDS_NAME and config is None:
        raise UsageError(
            f"{builder} holds your own data: name the dataset, as in {builder}/flowers"
            + see("data.md#your-own-files")
        )
    elif config is not None and not own.NEEDS_NAME:
        raise UsageError(f"{builder} has no variants: leave out /{config}")
    return builder, config


def _guess(name: str, data_dir: Path | None) -> str:
    """Says what may have been meant by a name that is not known."""
    if os.path.exists(name):
        return (
            "it is a path: prepare it first, python -m train.data prepare "
            f"image_folder/NAME --source {name}; "
        )
    there = prepared(data_dir)
    same = [known for known in there if known.rpartition("/")[2] == name]
    if same:
        return f"did you mean {' or '.join(same)}? "
    own = [builder for builder in BUILDERS.values() if builder.NEEDS_NAME]
    config = name.partition("/")[2] or "NAME"
    named = [f"{builder.name}/{config}" for builder in own]
    others = [known for known in _of_tfds() if known not in {b.name for b in own}]
    configs = {known.rpartition("/")[2]: known for known in there}
    return did_you_mean(name, [*there, *others, *named]) or "".join(
        f"did you mean {configs[config]}? "
        for config in difflib.get_close_matches(name, configs, n=1)
    )


def _of_tfds() -> list[str]:
    # Listing community datasets would need the network.
    return list(tfds.list_builders(with_community_datasets=False))


def _shown(name: str) -> str:
    return f"{name}/NAME" if BUILDERS[name].NEEDS_NAME else name


def prepare(
    name: str,
    *,
    source: Path | None = None,
    data_dir: Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> ImageBuilder | None:
    """Prepares a dataset from files, or with TFDS if it is from the TFDS catalogue.

    Args:
      name: name of the dataset.
      source: folder or archive to read; for the catalogue, the folder of files that
        have to be downloaded by hand.
      data_dir: folder of prepared datasets.
      progress: shows how far preparing is.
      **options: passed to the builder.

    Returns:
      The builder, whose `skipped` and `notes` say what was left out and what else a
      user should know; None for a dataset of the catalogue.

    Raises:
      UsageError: if the dataset cannot be prepared.
    """
    builder_name, config = _parse(name, data_dir)
    data_dir = data_dir or default_data_dir()
    own = BUILDERS.get(builder_name)
    if own is None:
        if options:
            raise UsageError(f"{', '.join(options)} is for your own data, not {name}")
        _prepare_by_tfds(name, source, data_dir)
        return None
    if own.NEEDS_SOURCE and source is None:
        raise UsageError(
            f"{name} needs its files: {_how_to_prepare(name)}"
            + see("data.md#what-can-be-prepared")
        )
    if source is not None and not own.NEEDS_SOURCE:
        raise UsageError(
            f"{name} is made from installed packages: leave out the source"
        )
    taken = {
        option
        for kind in (own, ImageBuilder)
        for option in inspect.signature(kind.__init__).parameters
    }
    if others := options.keys() - taken:
        raise UsageError(f"{name} does not take {', '.join(sorted(others))}")
    builder = own(
        data_dir=data_dir,
        config=config,
        source=source,
        progress=progress,
        **options,
    )
    builder.download_and_prepare()
    return builder


def _prepare_by_tfds(name: str, source: Path | None, data_dir: Path) -> None:
    if not _has_tensorflow():
        raise UsageError(
            f"{name} is from the TFDS catalogue: {_how_to_prepare(name)} ({data_dir})"
            + see("data.md#what-can-be-prepared")
        )
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=source)
    try:
        by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        there = any((data_dir / "downloads").rglob("*.INFO"))
        if not by_hand and not there:
            _reach(builder.url_infos or {})
        builder.download_and_prepare(download_config=config)
    except AssertionError as error:  # TFDS asks for files downloaded by hand
        raise UsageError(f"{error}\nThen: {command(name)} --source FOLDER") from error
    except (OSError, tfds.download.DownloadError) as error:
        raise UsageError(
            f"{name} could not be downloaded ({error}). On a machine without network, "
            f"copy {name} into {data_dir} from one where {command(name)} has run"
        ) from error


def _reach(urls: Iterable[str]) -> None:
    """Fails at once where TFDS would retry for minutes."""
    if urllib.request.getproxies():
        return  # the proxy looks names up
    for host in {urllib.parse.urlsplit(url).hostname for url in urls}:
        socket.getaddrinfo(host, None)


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def find_or_prepare(
    name: str, data_dir: Path | None = None, progress: Progress = silent
) -> Path:
    """Returns the folder of a dataset, which is prepared now if that needs no source.

    Raises:
      UsageError: if the dataset is not known or not prepared; the message says how to
        prepare it.
    """
    folder = folder_of(name, data_dir)
    if folder is not None:
        return folder
    own = BUILDERS.get(_builder_of(name))
    if own is None or own.NEEDS_SOURCE:
        raise UsageError(
            f"{name} is not prepared in {data_dir or default_data_dir()}: "
            f"{did_you_mean(name, prepared(data_dir))}{_how_to_prepare(name)}"
            + see("data.md#what-can-be-prepared")
        )
    prepare(name, data_dir=data_dir, progress=progress)
    prepared_now = folder_of(name, data_dir)
    assert prepared_now is not None
    return prepared_now


def _builder_of(name: str) -> str:
    return name.partition("/")[0]


def command(name: str) -> str:
    """Returns the command that prepares a dataset."""
    return f"python -m train.data prepare {name}"


def _how_to_prepare(name: str) -> str:
    if _builder_of(name) in BUILDERS:
        return f"{command(name)} --source PATH, a folder or archive with its files"
    return (
        f"pip install --group prepare for TensorFlow, which only this needs, and then "
        f"{command(name)}; without network, prepare it on another machine and copy it "
        "here"
    )
