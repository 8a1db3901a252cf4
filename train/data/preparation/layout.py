"""Helpers for folder layouts that several builders share."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from train.data.images import IMAGE_SUFFIXES, BadFileError, check_photo
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import Example, Item, shuffled
from train.errors import UsageError, see
from train.names import composed, is_note, listed

# train, Training, val2017, validation_set, test-images, ...
_SPLIT = re.compile(
    r"(?P<name>train|val|test)(ing|id|idation)?"
    r"([ _-]?(set|split|data|images?|imgs?|\d+))*",
    re.IGNORECASE,
)
_HALF_OF_SPLIT = re.compile(r"(train|val|test)(ing|id)?[ _-]?[ab]", re.IGNORECASE)
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_EXPECTED_IMAGE = f"expected an image, {' '.join(IMAGE_SUFFIXES)}"


def is_image(name: str) -> bool:
    """Returns whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def split_of(folder: str) -> str | None:
    """Returns the split that a folder is named after, or None.

    >>> split_of("Training"), split_of("val2017"), split_of("test_set"), split_of("cat")
    ('train', 'validation', 'test', None)
    """
    match = _SPLIT.fullmatch(folder)
    return _SPLITS[match["name"].lower()] if match else None


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
    raise _not_expected(source, marker)


def _not_expected(source: Source, marker: str, expected: str = "") -> SourceError:
    tops = sorted({name.split("/")[0] for name in source.names})
    return SourceError(
        f"{source.path} is not the expected folder or archive: it holds no {marker}, "
        f"but {listed(tops, 8) or 'nothing'}"
        + f"; expected {expected}" * bool(expected)
        + see("data.md#what-can-be-prepared")
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
        if len(below) != 1 or split_of(below[0]) or min(depths, default=0) <= contents:
            return prefix
        prefix += f"{below[0]}/"


def split_folders(source: Source, prefix: str) -> dict[str, str]:
    """Returns the prefix of each split's folder; {} if there are no such folders.

    Raises:
      SourceError: if there are some, but none to train on, or two of the same split.
    """
    below = subfolders(source, prefix)
    folders = {folder: split for folder in below if (split := split_of(folder))}
    found = {split: f"{prefix}{folder}/" for folder, split in folders.items()}
    if len(found) < len(folders):
        raise SourceError(
            f"{source.path} has two folders of one split: {', '.join(folders)}"
        )
    with_images = {
        name.removeprefix(prefix).partition("/")[0]
        for name in source.names
        if name.startswith(prefix) and "/" in name.removeprefix(prefix)
        if is_image(name)
    }
    if found and (others := sorted(with_images - set(folders))):
        raise SourceError(
            f"{source.path} has other folders beside the splits: {listed(others)}"
            + see("data.md#your-own-files")
        )
    _need_train(source, prefix, found)
    return {split: _inner(source, folder) for split, folder in found.items()}


def _need_train(source: Source, prefix: str, found: dict[str, str]) -> None:
    if found and "train" not in found:
        raise SourceError(
            f"{source.path} has folders of splits ({', '.join(found.values())}), but "
            f"no {prefix}train/"
        )


def _inner(source: Source, folder: str) -> str:
    """Enters a folder in a folder of the same split: test_set/test_set/."""
    split = split_of(PurePosixPath(folder).name)
    below = subfolders(source, folder)
    same = len(below) == 1 and split_of(below[0]) == split
    return f"{folder}{below[0]}/" if same else folder


class Roles(NamedTuple):
    """Names of two folders whose files belong together.

    Attributes:
      names: the names that each folder may have, in any case; the first is shown.
    """

    names: tuple[tuple[str, ...], tuple[str, ...]]

    def of(self, folder: str) -> int | None:
        """Returns which of the two a folder is named after, or None."""
        for role, names in enumerate(self.names):
            if folder.lower() in map(str.lower, names):
                return role
        return None

    @property
    def expected(self) -> str:
        """Describes the layouts that are read."""
        first, second = (names[0] for names in self.names)
        return (
            f"SPLIT/{first}/ and SPLIT/{second}/, or {first}/SPLIT/ and {second}/SPLIT/"
        )


def paired_folders(source: Source, roles: Roles) -> dict[str, tuple[str, str]]:
    """Finds two folders whose files belong together, in each split.

    Reads SPLIT/ROLE/ and ROLE/SPLIT/, or ROLE/ alone.

    Returns:
      The two prefixes by split; the only one is called "" without folders of splits.

    Raises:
      SourceError: if there are no such folders, or several that may be meant.
    """
    images = [PurePosixPath(name) for name in source.names if is_image(name)]
    folders = {str(parent) for path in images for parent in path.parents} - {"."}
    named = [
        PurePosixPath(folder)
        for folder in folders
        if (base := PurePosixPath(folder).name)
        and (split_of(base) or roles.of(base) is not None)
    ]
    depth = min((len(path.parts) for path in named), default=0)
    roots = {str(path.parent) for path in named if len(path.parts) == depth}
    if len(roots) > 1:
        shown = (names[0] for names in roles.names)
        places = listed(sorted(f"{root}/" for root in roots))
        raise SourceError(
            f"{source.path} has folders of splits, or of {' and '.join(shown)}, in "
            f"several places ({places}); expected {roles.expected}"
            + see("data.md#your-own-files")
        )
    root = "".join(f"{root}/" for root in roots - {"."})
    if any(split_of(path.name) for path in named if len(path.parts) == depth):
        splits = split_folders(source, root)
        return {split: _both(source, prefix, roles) for split, prefix in splits.items()}
    first, second = (
        (prefix, split_subfolders(source, prefix))
        for prefix in _both(source, root, roles)
    )
    if not first[1] and not second[1]:
        return {"": (first[0], second[0])}
    common = {s: (first[1][s], second[1][s]) for s in first[1] if s in second[1]}
    if "train" not in common:
        raise SourceError(
            f"{source.path} has no split train in both {first[0]} and {second[0]}; "
            f"expected {roles.expected}"
        )
    return common


def split_subfolders(source: Source, prefix: str) -> dict[str, str]:
    """Returns the prefixes of folders of splits in a folder, which may hold others."""
    return {
        split: f"{prefix}{folder}/"
        for folder in subfolders(source, prefix)
        if (split := split_of(folder))
    }


def _both(source: Source, prefix: str, roles: Roles) -> tuple[str, str]:
    """Finds the folders of both roles directly below a prefix."""
    found: tuple[list[str], list[str]] = ([], [])
    for folder in subfolders(source, prefix):
        role = roles.of(folder)
        path = f"{prefix}{folder}/"
        if role is not None and any(
            name.startswith(path) and is_image(name) for name in source.names
        ):
            found[role].append(path)
    for folders, names in zip(found, roles.names, strict=True):
        if not folders:
            raise _not_expected(source, f"{prefix}{names[0]}/", roles.expected)
        if len(folders) > 1:
            raise SourceError(
                f"{source.path} has several folders that may be {names[0]}/: "
                f"{', '.join(folders)}; leave one, or rename the others"
            )
    return found[0][0], found[1][0]


def check_fraction(fraction: float | None) -> float | None:
    """Checks and returns the share of examples to test on."""
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"test_fraction must be between 0 and 1, got {fraction}")
    return fraction


def divide(
    source: Source,
    items: dict[str, list[Item]],
    folders: Iterable[str],
    fraction: float | None,
    group: Callable[[Item], object],
) -> dict[str, list[Item]]:
    """Moves a share of every group to a test split, if there are no split folders.

    At least one item of each group is left to train on.

    Args:
      source: the files.
      items: the items of each split; all are in "train" if there are no folders.
      folders: the folders of the splits.
      fraction: the share; items are taken in the order of the hashes of their keys.
      group: returns the group of an item.

    Raises:
      SourceError: if there are neither folders nor a share, or both; or if folders of
        splits are somewhere else.
    """
    if folders and fraction is not None:
        raise SourceError(
            f"there are folders of splits ({', '.join(folders)}): leave out "
            "test_fraction, or merge them"
        )
    if folders:
        return items
    if buried := _buried_splits(source):
        raise SourceError(
            f"{source.path} has folders of splits where none is expected: "
            f"{listed(buried)}; expected all else inside train/, val/ and test/"
            + see("data.md#your-own-files")
        )
    lists = [
        name
        for name in source.names
        if not is_image(name) and split_of(PurePosixPath(name).stem)
    ]
    if fraction is None and lists:
        raise SourceError(
            f"{source.path} has lists that may be splits ({listed(lists)}), which are "
            "not read: move the files into folders train/, val/ and test/"
            + see("data.md#your-own-files")
        )
    if fraction is None:
        raise SourceError(
            "there are no folders of splits (train/, test/): declare the share of "
            "examples to test on, such as test_fraction 0.2"
            + see("data.md#your-own-files")
        )
    groups = defaultdict(list)
    for item in shuffled(items["train"]):
        groups[group(item)].append(item)
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    for members in groups.values():
        count = min(round(len(members) * fraction), len(members) - 1)
        splits["test"] += members[:count]
        splits["train"] += members[count:]
    return splits


def _buried_splits(source: Source) -> list[str]:
    return [
        f"{folder}/"
        for folder in sorted(source.folders)
        if split_of(name := PurePosixPath(folder).name)
        or _HALF_OF_SPLIT.fullmatch(name)
    ]


def images_below(
    source: Source, prefix: str, bad: Callable[[str, str], None]
) -> list[str]:
    """Names the images below a prefix.

    Args:
      source: the files.
      prefix: the prefix.
      bad: called with each other file, unless it is a readme or the like.
    """
    names = [n for n in source.names if n.startswith(prefix) and not is_note(n)]
    for name in names:
        if not is_image(name):
            bad(name, _EXPECTED_IMAGE)
    return [name for name in names if is_image(name)]


def match(
    source: Source,
    photos: str,
    masks: str,
    bad: Callable[[str, str], None],
    whats: tuple[str, str] = ("image", "mask"),
) -> list[tuple[str, str]]:
    """Pairs the files of one folder with those of another, by name without suffix.

    Args:
      source: the files.
      photos: prefix of the photos.
      masks: prefix of the label images.
      bad: called with each file that has no counterpart or is no image, and the
        problem.
      whats: what the files of the two folders are called in errors.
    """
    by_stem: dict[str, dict[PurePosixPath, str]] = {photos: {}, masks: {}}
    for prefix, found in by_stem.items():
        for name in images_below(source, prefix, bad):
            stem = PurePosixPath(name.removeprefix(prefix)).with_suffix("")
            if found.setdefault(stem, name) != name:
                bad(name, f"has the name of {found[stem]}")
    image, mask = whats
    for prefix, other, what in ((photos, masks, mask), (masks, photos, image)):
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

    return Item(name, make, label=label)


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
    return [composed(line.strip()) for line in lines if line.strip()]
