"""What the values of masks mean, compared with those that the files hold."""

from collections.abc import Mapping, Sequence

from train.data.images import check_mask, check_photo
from train.data.preparation import layout
from train.data.preparation.archives import Source, SourceError
from train.data.preparation.builder import Example, Item
from train.errors import see
from train.names import listed

_WHITE = 255


class Labels:
    """The declared meaning of mask values, and the values that were found.

    A value is the number of its class. White, 255, means no class unless another value
    is declared for that. Only with two classes it may mean the second one, as many
    programs draw masks in black and white: it does if no mask holds the value 1 and 255
    was not declared to mean no class.

    If 0 is declared to mean no class, the classes have the values from 1. They are
    stored from 0 all the same, and 0 as 255.

    Attributes:
      stored_ignore_label: the value that means no class where masks are stored.
    """

    def __init__(self, names: Sequence[str], ignore_label: int | None):
        """Declares the meaning of values.

        Args:
          names: names of the classes, in the order of their values from 0.
          ignore_label: value of pixels without a class; None if it is not declared.
        """
        self._names = names
        self._ignored = _WHITE if ignore_label is None else ignore_label
        self.stored_ignore_label = self._ignored or _WHITE
        first = 0 if self._ignored else 1
        self._may_be_white = len(names) == 2 and ignore_label not in (0, _WHITE)
        self._mapping = {first + i: i for i in range(len(names))}
        self._mapping[self._ignored] = self.stored_ignore_label
        if self._may_be_white:
            self._mapping[_WHITE] = _WHITE
        self._found: dict[str, frozenset[int]] = {}

    def item(self, source: Source, photo_file: str, mask_file: str) -> Item:
        """Returns a photo with its mask, which may hold the declared values only."""

        def make() -> Example:
            photo = check_photo(layout.read(source, photo_file), photo_file)
            data = layout.read(source, mask_file)
            mask = check_mask(data, mask_file, self._mapping, photo, photo_file)
            self._found[photo_file] = mask.values
            return {"image": photo.data, "mask": mask.data}

        return Item(photo_file, make, files=(mask_file,))

    def settle(self, source: Source, splits: Mapping[str, Sequence[Item]]) -> list[str]:
        """Decides what white means, when all masks have been checked.

        Args:
          source: the files, for errors.
          splits: the examples of each split.

        Returns:
          What a user should know: what white and 0 mean, and classes without a pixel.

        Raises:
          SourceError: if the masks contradict what was declared, or do not hold at
            least two classes to tell apart.
        """
        found = {
            split: [(item.key, self._found[item.key]) for item in items]
            for split, items in splits.items()
        }
        notes = self._settle_white(source, [x for part in found.values() for x in part])
        if not self._ignored:
            notes.append("0 means no class and is stored as 255, and classes from 0")
        for split, part in found.items():
            held = {self._mapping[value] for _, values in part for value in values}
            classes = held - {self.stored_ignore_label}
            missing = [n for i, n in enumerate(self._names) if i not in classes]
            if len(classes) < (2 if split == "train" else 1):
                self._refuse(source, split, held, classes, missing)
            if missing:
                notes.append(f"no mask of {split} has a pixel of {listed(missing, 20)}")
        return notes

    def _settle_white(
        self, source: Source, found: Sequence[tuple[str, frozenset[int]]]
    ) -> list[str]:
        with_white = [key for key, values in found if _WHITE in values]
        if not (self._may_be_white and with_white):
            return []
        with_one = [key for key, values in found if 1 in values]
        if not with_one:
            self._mapping[_WHITE] = 1
            return [f"white, 255, is {self._names[1]}: no mask holds the value 1"]
        if self._ignored == _WHITE and set(with_white) & set(with_one):
            return []
        raise SourceError(
            f"{source.path}: masks hold both 1 (that of {with_one[0]}) and white, 255 "
            f"(that of {with_white[0]}): declare ignore_label 255 if white means no "
            f"class, or store {self._names[1]} as one value"
            + see("data.md#your-own-files")
        )

    def _refuse(
        self,
        source: Source,
        split: str,
        held: set[int],
        classes: set[int],
        missing: Sequence[str],
    ) -> None:
        names = [self._names[i] for i in sorted(classes)] or ["pixels without a class"]
        ignored = self.stored_ignore_label in held
        also = f" and the value {self._ignored}, which is ignored" * ignored
        first = 0 if self._ignored else 1
        remedy = "store masks whose values are the numbers of the classes, from "
        remedy += str(first)
        if ignored and self._ignored == _WHITE:
            remedy += (
                "; if white means the second of two classes, declare two classes and "
                "no ignore_label"
            )
        raise SourceError(
            f"{source.path}: the masks of {split} hold only {listed(names)}{also}, and "
            f"no pixel of {listed(missing, 20)}: {remedy}"
            + see("data.md#your-own-files")
        )
