"""Images as files hold them: checked when a dataset is prepared, decoded when read."""

import io
import struct
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_MODES = {1: "L", 3: "RGB"}
_PNG_DEPTH = 24  # place of the byte that has the bits per channel
_ORIENTATION = 0x0112
# PIL's decoders raise these on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    MemoryError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
)
_open_lock = threading.Lock()


class BadFileError(ValueError):
    """A file that cannot become an example; the message says what was expected.

    Attributes:
      file: its name in the source.
    """

    def __init__(self, file: str, problem: object):
        super().__init__(f"{file}: {problem}")
        self.file = file


class Photo(NamedTuple):
    """A checked image file: its content, and (width, height) in pixels."""

    data: bytes
    size: tuple[int, int]


def check_photo(data: bytes, file: str, channels: int = 3) -> Photo:
    """Checks an image file, whole, and returns it in a form every reader decodes alike.

    A file that is upright and of the right colour mode is kept as it is; any other is
    turned upright, converted and encoded anew as PNG, without loss.

    Args:
      data: the file's content, JPEG, PNG or WebP.
      file: its name, for errors.
      channels: 1 or 3.

    Raises:
      BadFileError: if it is no such file, damaged, too large, or of 16 bits.
    """
    image = open_image(data, file, ("JPEG", "PNG", "WEBP"))
    if image.format == "PNG" and data[_PNG_DEPTH] > 8:
        raise BadFileError(file, "16 bits; expected 8 bits per channel")
    try:
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        if upright and image.mode == _MODES[channels]:
            return Photo(data, image.size)
        image = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise BadFileError(
            file, f"damaged EXIF data ({error}); expected none, or whole ones"
        ) from None
    image.apply_transparency()  # of a palette, of which PIL warns else
    image = image.convert(_MODES[channels])
    return Photo(encode_png(image), image.size)


def check_mask(
    data: bytes, file: str, labels: set[int], photo: Photo, photo_file: str
) -> bytes:
    """Checks a label image, and returns it as a grey PNG whose values are the labels.

    Args:
      data: the file's content, PNG with grey values or palette indices as labels.
      file: its name, for errors.
      labels: the values it may hold, those to be ignored included.
      photo: what it labels.
      photo_file: name of that, for errors.

    Raises:
      BadFileError: if it is no such file or damaged, or differs from size or labels.
    """
    mask = open_image(data, file, ("PNG",))
    if mask.mode not in ("1", "L", "P"):
        raise BadFileError(
            file,
            f"mode {mask.mode}; expected one channel, or a palette, whose value is the "
            "class",
        )
    if mask.size != photo.size:
        expected = "{}x{}".format(*photo.size)
        raise BadFileError(
            file,
            f"{mask.width}x{mask.height} pixels; expected {expected} as {photo_file}",
        )
    values = np.asarray(mask).astype(np.uint8)
    others = set(np.flatnonzero(np.bincount(values.ravel(), minlength=256))) - labels
    if others:
        shown = ", ".join(map(str, sorted(others)[:5])) + ", ..." * (len(others) > 5)
        raise BadFileError(
            file, f"label values {shown}; expected only {_ranges(labels)}"
        )
    return data if mask.mode == "L" else encode_png(Image.fromarray(values))


def open_image(data: bytes, file: str, formats: tuple[str, ...]) -> Image.Image:
    """Opens and reads an image, whole.

    Raises:
      BadFileError: if it is of another format, damaged, or a decompression bomb.
    """
    expected = f"expected {', '.join(formats)}"
    try:
        # Filters of warnings are the process's own, not the thread's.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
        image.load()
    except UnidentifiedImageError:
        raise BadFileError(file, f"not an image of a known kind; {expected}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadFileError(
            file, f"{error}; expected at most {Image.MAX_IMAGE_PIXELS:,} pixels"
        ) from None
    except _DAMAGE as error:
        raise BadFileError(file, f"damaged ({error}); {expected}, whole") from None
    return image


def encode_png(image: Image.Image) -> bytes:
    """A PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> np.ndarray:
    """An image as uint8 (height, width, channels)."""
    image = Image.open(io.BytesIO(data))
    if image.mode != _MODES[channels]:  # of a dataset that was prepared elsewhere
        image = image.convert(_MODES[channels])
    return np.asarray(image).reshape(image.height, image.width, channels)


def _ranges(values: set[int]) -> str:
    """Numbers in short: {0, 1, 2, 255} is "0-2, 255"."""
    starts = sorted(v for v in values if v - 1 not in values)
    ends = sorted(v for v in values if v + 1 not in values)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)
