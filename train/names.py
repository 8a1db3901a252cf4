"""Names of files, classes and datasets: compared, shown, and guessed if misspelt."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

_NOTE = re.compile(
    r"(read[ _-]?me|licen[cs]e|copying|copyright|notice|citation|authors|changelog)"
    r"[^/]*?(\.(txt|md|rst|html?|pdf|cff|bib|rtf|docx?))?",
    re.IGNORECASE,
)
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def is_note(file: str) -> bool:
    """Returns whether a file is a readme, a license or the like.

    >>> is_note("flowers/README.roboflow.txt"), is_note("LICENSE"), is_note("a.txt")
    (True, True, False)
    """
    name = file.rpartition("/")[2]
    return _NOTE.fullmatch(name) is not None and not re.search(
        r"\.(jpe?g|png|webp|bmp|tiff?|gif)$", name, re.IGNORECASE
    )


def composed(name: str) -> str:
    r"""Returns a name in the composed form of Unicode, NFC.

    Some systems and archives store "é" as one character, others as two.

    >>> composed("cafe\u0301") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    r"""Returns text without characters that a terminal would obey or cannot show.

    >>> print(printable("a\x1b[31mb\udce9.jpg"))
    a\x1b[31mb\udce9.jpg
    """
    return "".join(
        c.encode("unicode_escape").decode() if c != "\n" and _is_unsafe(c) else c
        for c in text
    )


def _is_unsafe(character: str) -> bool:
    """Whether it controls a terminal, turns text around, or cannot be encoded."""
    if character == "\t":
        return False
    turns = unicodedata.bidirectional(character) in _TURNING
    return turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Lists the first of some names.

    >>> listed(["a", "b", "c"], most=2)
    'a, b, ... (3)'
    """
    return ", ".join(names[:most]) + f", ... ({len(names)})" * (len(names) > most)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a question that names what is spelt alike; "" if nothing is.

    Initials name what they stand for. If nothing is alike, a word in common will do.

    >>> did_you_mean("tiny_imagnet", ["digits", "tiny_imagenet"])
    'did you mean tiny_imagenet? '
    >>> did_you_mean("--lr", ["--learning-rate", "--epochs"])
    'did you mean --learning-rate? '
    """
    shown = {k.lstrip("-"): k for k in sorted(set(known))}
    words = _words(name)
    close = (
        [k for k in shown if len(_words(k)) > 1 and [_initials(k)] == words]
        or difflib.get_close_matches(name.lstrip("-"), shown, n=2)
        or [k for k in shown if set(words) & set(_words(k))]
    )
    guesses = " or ".join(shown[k] for k in close[:2])
    return f"did you mean {guesses}? " if guesses else ""


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if len(word) > 1]


def _initials(name: str) -> str:
    return "".join(word[0] for word in _words(name))
