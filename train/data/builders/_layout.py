"""Folder layouts that several builders share."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import PurePosixPath

from train.data._builder import Example, Item, shuffled
from train.data._images import IMAGE_SUFFIXES, BadFileError, check_mask, check_photo
from train.data._source import Source, SourceError
from train.errors import UsageError

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def subfolders(source: Source, prefix: str) -> list[str]:
    """Names of the folders right below a prefix, which is "" or ends in a slash."""
    rests = (f.removeprefix(prefix) for f in source.folders if f.startswith(prefix))
    return sorted(rest for rest in rests if "/" not in rest)


def find_root(source: Source, marker: str) -> str:
    """The prefix of what only the right archive has, a file or a folder.

    Raises:
      SourceError: if it is not there.
    """
    for name in (*source.names, *sorted(source.folders)):
        if name == marker or name.endswith(f"/{marker}"):
            return name.removesuffix(marker)
    tops = sorted({name.split("/")[0] for name in source.names})
    held = ", ".join(tops[:8]) + ", ..." * (len(tops) > 8)
    raise SourceError(
        f"{source.path} is not the expected folder or archive: it holds no {marker}, "
        f"but {held or 'nothing'}"
    )


def top_folder(source: Source, contents: int) -> str:
    """The prefix of the folders in which an archive holds all else.

    Args:
      source: the files.
      contents: how many folders deep images must lie below it.
    """
    prefix = ""
    while True:
        below = subfolders(source, prefix)
        images = filter(is_image, source.names)
        depths = (name.removeprefix(prefix).count("/") for name in images)
        if (
            len(below) != 1
            or below[0].lower() in _SPLITS
            or min(depths, default=0) <= contents
        ):
            return prefix
        prefix += f"{below[0]}/"


def split_folders(source: Source, prefix: str) -> dict[str, str]:
    """Prefixes of the folders of splits, by the splits' names; {} if there are none.

    Raises:
      SourceError: if there are some, but none to train on, or two of the same split.
    """
    below = subfolders(source, prefix)
    folders = [folder for folder in below if folder.lower() in _SPLITS]
    found = {_SPLITS[folder.lower()]: f"{prefix}{folder}/" for folder in folders}
    if len(found) < len(folders):
        raise SourceError(
            f"{source.path} has two folders of one split: {', '.join(folders)}"
        )
    if found and len(folders) < len(below):
        others = ", ".join(sorted(set(below) - set(folders)))
        raise SourceError(
            f"{source.path} has other folders beside those of splits: {others}"
        )
    if found and "train" not in found:
        raise SourceError(
            f"{source.path} has folders of splits ({', '.join(found.values())}), but "
            f"no {prefix}train/"
        )
    return found


def check_fraction(fraction: float | None) -> float | None:
    """Checks the share of examples to set apart."""
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"test fraction must lie between 0 and 1, got {fraction}")
    return fraction


def divide(
    items: dict[str, list[Item]],
    folders: dict[str, str],
    fraction: float | None,
    group: Callable[[Item], object],
) -> dict[str, list[Item]]:
    """Sets a share of every group apart for testing, where folders do not.

    Args:
      items: of each split; all of "train" if there are no folders.
      folders: of the splits.
      fraction: the share, of items in the order of their keys' hashes.
      group: what an item belongs to.

    Raises:
      SourceError: if there is neither a folder nor a share, or both.
    """
    if folders and fraction is not None:
        raise SourceError(
            f"there are folders of splits ({', '.join(folders.values())}): leave out "
            "--test-fraction, or merge them"
        )
    if folders:
        return items
    if fraction is None:
        raise SourceError(
            "there are no folders of splits (train/, test/): declare the share of "
            "examples to test on, such as --test-fraction 0.2"
        )
    groups = defaultdict(list)
    for item in shuffled(items["train"]):
        groups[group(item)].append(item)
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    for members in groups.values():
        count = round(len(members) * fraction)
        splits["test"] += members[:count]
        splits["train"] += members[count:]
    return splits


def match(
    source: Source, photos: str, masks: str, bad: Callable[[str, str], None]
) -> list[tuple[str, str]]:
    """Photos of one folder with the label images of the same names of another.

    Args:
      source: the files.
      photos: prefix of the photos.
      masks: prefix of the label images.
      bad: told of files without their counterpart.
    """
    by_stem: dict[str, dict[PurePosixPath, str]] = {photos: {}, masks: {}}
    for prefix, found in by_stem.items():
        for name in source.names:
            if name.startswith(prefix) and is_image(name):
                stem = PurePosixPath(name.removeprefix(prefix)).with_suffix("")
                if found.setdefault(stem, name) != name:
                    bad(name, f"has the name of {found[stem]}")
    for prefix, other, what in ((photos, masks, "mask"), (masks, photos, "image")):
        for stem in by_stem[prefix].keys() - by_stem[other].keys():
            bad(by_stem[prefix][stem], f"has no {what}; expected {other}{stem}.*")
    return [
        (name, by_stem[masks][stem])
        for stem, name in by_stem[photos].items()
        if stem in by_stem[masks]
    ]


def labelled(source: Source, name: str, label: int) -> Item:
    """A colour image with the number of its class."""

    def make() -> Example:
        return {"image": check_photo(read(source, name), name).data, "label": label}

    return Item(name, make)


def segmented(
    source: Source, photo_file: str, mask_file: str, labels: set[int]
) -> Item:
    """A photo with its label image, whose values are to be among `labels`."""

    def make() -> Example:
        photo = check_photo(read(source, photo_file), photo_file)
        mask = check_mask(read(source, mask_file), mask_file, labels, photo, photo_file)
        return {"image": photo.data, "mask": mask}

    return Item(photo_file, make)


def read(source: Source, name: str) -> bytes:
    """The content of a file; what is wrong with it is a BadFileError."""
    if name not in source:
        raise BadFileError(name, "listed, but not there")
    try:
        return source.read(name)
    except ValueError as error:
        raise BadFileError(name, error) from None


def read_lines(source: Source, name: str) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = read(source, name).decode("utf-8-sig").splitlines()
    except BadFileError as error:
        raise SourceError(f"{source.path}: {error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{source.path}: {name} is not UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]
