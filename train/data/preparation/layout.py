"""Helpers for folder layouts that several builders share."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import PurePosixPath

from train.data.images import IMAGE_SUFFIXES, BadFileError, check_mask, check_photo
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import Example, Item, shuffled
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
    """Returns whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def subfolders(source: Source, prefix: str) -> list[str]:
    """Names the folders directly below a prefix, which is "" or ends in a slash."""
    rests = (f.removeprefix(prefix) for f in source.folders if f.startswith(prefix))
    return sorted(rest for rest in rests if "/" not in rest)


def find_root(source: Source, marker: str) -> str:
    """Returns the prefix of a file or folder that only the right archive has.

    Raises:
      SourceError: if there is no such file or folder.
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
    """Returns the prefix of the outer folders that contain everything else.

    Args:
      source: the files.
      contents: number of folders that must remain between the prefix and the images.
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
    """Returns the prefix of each split's folder; {} if there are no such folders.

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
            f"{source.path} has other folders beside the splits: {others}"
        )
    if found and "train" not in found:
        raise SourceError(
            f"{source.path} has folders of splits ({', '.join(found.values())}), but "
            f"no {prefix}train/"
        )
    return found


def check_fraction(fraction: float | None) -> float | None:
    """Checks and returns the share of examples to test on."""
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"test_fraction must be between 0 and 1, got {fraction}")
    return fraction


def divide(
    items: dict[str, list[Item]],
    folders: dict[str, str],
    fraction: float | None,
    group: Callable[[Item], object],
) -> dict[str, list[Item]]:
    """Moves a share of every group to a test split, if there are no split folders.

    Args:
      items: the items of each split; all are in "train" if there are no folders.
      folders: the folders of the splits.
      fraction: the share; items are taken in the order of the hashes of their keys.
      group: returns the group of an item.

    Raises:
      SourceError: if there are neither folders nor a share, or both.
    """
    if folders and fraction is not None:
        raise SourceError(
            f"there are folders of splits ({', '.join(folders.values())}): leave out "
            "test_fraction, or merge them"
        )
    if folders:
        return items
    if fraction is None:
        raise SourceError(
            "there are no folders of splits (train/, test/): declare the share of "
            "examples to test on, such as test_fraction 0.2"
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
    """Pairs the photos of one folder with the label images of another, by name.

    Args:
      source: the files.
      photos: prefix of the photos.
      masks: prefix of the label images.
      bad: called with each file that has no counterpart, and the problem.
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


def labeled(source: Source, name: str, label: int) -> Item:
    """Returns a color image with the number of its class."""

    def make() -> Example:
        return {"image": check_photo(read(source, name), name).data, "label": label}

    return Item(name, make)


def segmented(
    source: Source, photo_file: str, mask_file: str, labels: set[int]
) -> Item:
    """Returns a photo with its label image, which may have the values in `labels`."""

    def make() -> Example:
        photo = check_photo(read(source, photo_file), photo_file)
        mask = check_mask(read(source, mask_file), mask_file, labels, photo, photo_file)
        return {"image": photo.data, "mask": mask}

    return Item(photo_file, make)


def read(source: Source, name: str) -> bytes:
    """Returns the content of a file.

    Raises:
      BadFileError: if it is missing or damaged.
    """
    if name not in source:
        raise BadFileError(name, "listed, but not there")
    try:
        return source.read(name)
    except ValueError as error:
        raise BadFileError(name, error) from None


def read_lines(source: Source, name: str) -> list[str]:
    """Returns the lines of a text file that are not empty."""
    try:
        lines = read(source, name).decode("utf-8-sig").splitlines()
    except BadFileError as error:
        raise SourceError(f"{source.path}: {error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{source.path}: {name} is not UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]
