"""Image files: checked when a dataset is prepared, and decoded when it is read."""

import io
import struct
import threading
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_MODES = {1: "L", 3: "RGB"}
_PNG_DEPTH = 24  # index of the byte that holds the bits per channel
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
      file: name of the file in the source.
    """

    def __init__(self, file: str, problem: object):
        super().__init__(f"{file}: {problem}")
        self.file = file


class Photo(NamedTuple):
    """The content of a checked image file, and its (width, height) in pixels."""

    data: bytes
    size: tuple[int, int]


def check_photo(data: bytes, file: str, channels: int = 3) -> Photo:
    """Checks an image file, and returns it in a form that every reader decodes alike.

    A file that is upright and has the right color mode is kept unchanged. Any other is
    turned upright, converted and encoded as PNG, which loses nothing.

    Args:
      data: content of the file, JPEG, PNG or WebP.
      file: name of the file, for errors.
      channels: 1 or 3.

    Raises:
      BadFileError: if it is no such file, or is damaged, too large or of 16 bits.
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
    image.apply_transparency()  # PIL would warn of a palette with transparency
    converted = image.convert(_MODES[channels])
    return Photo(encode_png(converted), converted.size)


def check_mask(
    data: bytes, file: str, labels: set[int], photo: Photo, photo_file: str
) -> bytes:
    """Checks a label image, and returns it as a gray PNG whose values are the labels.

    Args:
      data: content of the file, a PNG whose gray values or palette indices are labels.
      file: name of the file, for errors.
      labels: the values that it may hold, including those to be ignored.
      photo: the photo to which the labels belong.
      photo_file: name of the photo, for errors.

    Raises:
      BadFileError: if it is no such file, is damaged, has another size than the photo
        or holds other values.
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
    """Opens an image and reads all of it.

    Raises:
      BadFileError: if it has another format, is damaged or is a decompression bomb.
    """
    expected = f"expected {', '.join(formats)}"
    try:
        # All threads of a process share its warning filters.
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
    """Returns the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """Decodes an image as uint8 (height, width, channels)."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode != _MODES[channels]:  # the dataset was prepared elsewhere
        image = image.convert(_MODES[channels])
    return np.asarray(image).reshape(image.height, image.width, channels)


def size_of(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of an image, which is not decoded for it."""
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def _ranges(values: set[int]) -> str:
    """Writes numbers as ranges: {0, 1, 2, 255} is "0-2, 255"."""
    starts = sorted(v for v in values if v - 1 not in values)
    ends = sorted(v for v in values if v + 1 not in values)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)
