"""What all figures share: how they are saved, their text and their colors."""

import bisect
import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import color_sequences, style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # not pyplot, which keeps global state
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import TextPath

from train.files import whole_file

Colors: TypeAlias = UInt8[np.ndarray, "classes 3"]  # RGB

_DPI = 120
FONT_SIZE = 9  # points
GAP = 0.12  # inches between parts of a figure, and around it

# The first comes with Matplotlib; the others are taken where they are installed.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans"),
    *("Microsoft YaHei", "Malgun Gothic", "Yu Gothic", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "WenQuanYi Zen Hei", "Noto Sans Arabic"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Arial Unicode MS"),
)

# --------------------------------- Saving ---------------------------------------------


@contextlib.contextmanager
def new_figure(
    path: Path, size: tuple[float, float], *, crop: bool = False
) -> Iterator[Figure]:
    """Yields a figure to draw on, and saves it when all is drawn.

    Within the block the settings are Matplotlib's defaults, with more fonts, and text
    is never a formula. Use `shortened` or `readable` for text that a user wrote.

    Args:
      path: the PNG file to write.
      size: width and height in inches.
      crop: whether to save what is drawn, which may lie outside of `size`; otherwise
        all is fitted into `size`.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        style.use(["default", {"text.parse_math": False, "font.size": FONT_SIZE}])
        matplotlib.rcParams["font.family"] = _fonts()[0]
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(size, dpi=_DPI, layout=None if crop else "constrained")
        yield figure
        cut: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": GAP}
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", **(cut if crop else {}))


# ---------------------------------- Text ----------------------------------------------


def readable(text: str) -> str:
    r"""Returns text with the codes of characters that no font here can draw.

    >>> print(readable("caf\u00e9 \U0001f4a9"))
    café \U0001f4a9
    """
    drawn = _fonts()[1] | {ord("\n")}
    return "".join(
        c if ord(c) in drawn else c.encode("unicode_escape").decode() for c in text
    )


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Returns the names of the fonts to draw with, and the characters they have."""
    files = {font.name: font.fname for font in fontManager.ttflist}
    names = [name for name in _FONTS if name in files]
    characters = (FT2Font(files[name]).get_charmap() for name in names)
    return names, frozenset().union(*characters)


def shortened(text: str, width: float) -> str:
    """Returns readable text, cut to a width in inches."""
    text = readable(text)
    if text_width(text) <= width:
        return text
    lengths = range(1, len(text))
    n = bisect.bisect(lengths, width, key=lambda n: text_width(text[:n] + "…"))
    return text[:n].rstrip() + "…"


def text_width(text: str) -> float:
    """Returns the width of text of the usual size in inches."""
    if not text.strip():  # TextPath needs something to draw
        return 0.0
    return float(TextPath((0, 0), text, size=FONT_SIZE).get_extents().width / 72)


# --------------------------------- Colors ---------------------------------------------


def class_colors(n: int) -> Colors:
    """Returns colors that are easy to tell apart, and from black, white and gray.

    The first eight can be told apart under color vision deficiency too. After them,
    each is the one of 512 colors that looks most unlike all before it. A longer palette
    begins with the shorter ones.

    Args:
      n: number of colors; beyond 520 they repeat.

    Examples:
      >>> class_colors(2).tolist()
      [[63, 144, 218], [255, 169, 14]]
    """
    petroff = np.rint(255 * np.array([to_rgb(c) for c in color_sequences["petroff10"]]))
    petroff = petroff[np.ptp(petroff, axis=1) > 20]  # without the two that are gray
    neutral = [[level] * 3 for level in (0, 128, 255)]
    levels = np.arange(30, 241, 30)
    others = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    colors = np.concatenate([neutral, petroff, others])
    lab = _cielab(colors)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    chosen = list(range(len(neutral) + len(petroff)))
    while len(chosen) < min(len(neutral) + n, len(colors)):
        chosen.append(int(distances[chosen].min(axis=0).argmax()))
    palette = colors[chosen[len(neutral) :]].astype(np.uint8)
    return palette[np.arange(n) % len(palette)]


def _cielab(rgb: np.ndarray) -> Float[np.ndarray, "n 3"]:
    """Moves colors to where their distances are as large as they look.

    CIELAB without its offset and its bend near black.
    """
    # The stimuli XYZ, 1 each for white; then lightness, green to red, blue to yellow.
    xyz = [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]]
    lab = [[0, 116, 0], [500, -500, 0], [0, 200, -200]]
    bent = np.cbrt((rgb / 255) ** 2.2 @ np.transpose(xyz))
    return np.asarray(bent @ np.transpose(lab))
