"""Image files: checked when a dataset is prepared, and decoded when it is read."""

import io
import struct
import threading
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from train.names import printable

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".bmp", ".tif", ".tiff", ".gif"),
)

_KEPT = ("JPEG", "MPO", "PNG", "WEBP")  # every reader of a dataset decodes them
_PHOTOS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MASKS = ("PNG", "BMP", "TIFF", "GIF", "WEBP")
_MODES = {1: "L", 3: "RGB"}
_WIDE_MODES = ("I", "F")  # and those that begin with one of them, such as I;16
_PNG_DEPTH = 24  # index of the byte that holds the bits per channel
_TIFF_DEPTH = 258  # tag of the bits per channel
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
        super().__init__(printable(f"{file}: {problem}"))
        self.file = file


class Photo(NamedTuple):
    """A checked image file.

    Attributes:
      data: its content.
      size: (width, height) in pixels.
      orientation: the EXIF orientation that the file had; `data` is upright.
    """

    data: bytes
    size: tuple[int, int]
    orientation: int = 1


class Mask(NamedTuple):
    """A checked label image.

    Attributes:
      data: a gray PNG whose values are classes.
      values: the values that the file held.
    """

    data: bytes
    values: frozenset[int]


def check_photo(data: bytes, file: str, channels: int = 3) -> Photo:
    """Checks an image file, and returns it in a form that every reader decodes alike.

    A JPEG, PNG or WebP file that is upright, opaque and has the right color mode is
    kept unchanged. Any other is turned upright, laid on white where it is transparent,
    converted and encoded as PNG, which loses nothing.

    Args:
      data: content of the file, JPEG, PNG, WebP, BMP, TIFF or GIF.
      file: name of the file, for errors.
      channels: 1 or 3.

    Raises:
      BadFileError: if it is no such file, or is damaged, too large, of more than 8 bits
        or several images.
    """
    image = open_image(data, file, _PHOTOS)
    _refuse_wide(image, data, file)
    upright, orientation = _upright(image, data, file)
    mode = _MODES[channels]
    opaque = not image.has_transparency_data
    kept = image.format in _KEPT
    if kept and opaque and orientation == 1 and image.mode == mode:
        return Photo(data, image.size)
    try:
        converted = (upright if opaque else _on_white(upright)).convert(mode)
    except _DAMAGE as error:
        raise BadFileError(
            file, f"cannot be read as {mode} from {image.mode} ({error}); expected RGB"
        ) from None
    return Photo(encode_png(converted), converted.size, orientation)


def _refuse_wide(image: Image.Image, data: bytes, file: str) -> None:
    """Refuses more than 8 bits per channel, which would lose their low bits."""
    bits = 8
    if image.format == "PNG":
        bits = data[_PNG_DEPTH]
    elif image.format == "TIFF":
        bits = int(np.max(image.getexif().get(_TIFF_DEPTH, 1)))
    if bits > 8 or image.mode.startswith(_WIDE_MODES):
        bits = max(bits, 16)
        raise BadFileError(file, f"{bits} bits; expected 8 bits per channel")


def _upright(image: Image.Image, data: bytes, file: str) -> tuple[Image.Image, int]:
    """Returns an image as EXIF turns it, and the orientation in which it is stored."""
    is_tiff = image.format == "TIFF"  # which Pillow has turned already
    try:
        stored = Image.open(io.BytesIO(data)) if is_tiff else image
        orientation = stored.getexif().get(_ORIENTATION, 1)
    except _DAMAGE as error:
        raise BadFileError(
            file, f"damaged EXIF data ({error}); expected none, or whole ones"
        ) from None
    if orientation not in _TURNS:
        return image, 1
    return image if is_tiff else image.transpose(_TURNS[orientation]), orientation


def _on_white(image: Image.Image) -> Image.Image:
    """Lays a transparent image on white."""
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA"))


def check_mask(
    data: bytes,
    file: str,
    labels: Mapping[int, int],
    photo: Photo,
    photo_file: str,
) -> Mask:
    """Checks a label image, and returns it as a gray PNG whose values are the labels.

    Args:
      data: content of the file, a PNG, BMP, TIFF, GIF or WebP whose gray values or
        palette indices are labels. White is 255, also in files of 1 bit.
      file: name of the file, for errors.
      labels: the label of each value that it may hold, including one to be ignored.
      photo: the photo to which the labels belong.
      photo_file: name of the photo, for errors.

    Raises:
      BadFileError: if it is no such file, is damaged, has another size than the photo
        or holds other values.
    """
    mask = open_image(data, file, (*_MASKS, "JPEG"))
    if mask.format == "JPEG":
        raise BadFileError(
            file, f"JPEG, which changes values; expected {', '.join(_MASKS)}"
        )
    if mask.has_transparency_data:
        raise BadFileError(
            file,
            "transparent pixels, which have no class; expected a mask saved without "
            "an alpha channel, in which a value means no class",
        )
    upright, orientation = _upright(mask, data, file)
    turned = _as_its_photo(upright, orientation, file, photo, photo_file)
    values = _values(turned, mask.format, file)
    found = frozenset(np.unique(values).tolist())
    if others := sorted(found - labels.keys()):
        shown = ", ".join(map(str, others[:5])) + ", ..." * (len(others) > 5)
        raise BadFileError(
            file, f"label values {shown}; expected only {_ranges(set(labels))}"
        )
    unchanged = (mask.format, mask.mode) == ("PNG", "L") and turned is mask
    if unchanged and all(labels[value] == value for value in found):
        return Mask(data, found)
    lookup = np.zeros(256, np.uint8)
    lookup[list(labels)] = list(labels.values())
    return Mask(encode_png(Image.fromarray(lookup[values])), found)


def _values(mask: Image.Image, kind: str | None, file: str) -> np.ndarray:
    """Returns the values of a label image of some format, (height, width)."""
    if mask.mode == "1":
        mask = mask.convert("L")  # white is 255, as in a copy of 8 bits
    if kind == "GIF":
        mask = mask.convert("RGB")  # programs renumber its palette
    values = np.asarray(mask)
    if mask.mode == "RGB" and (values == values[..., :1]).all():
        return values[..., 0]
    if mask.mode in ("L", "P", "I") or mask.mode.startswith("I;16"):
        return values
    what = "colors" if mask.mode == "RGB" else f"mode {mask.mode}"
    raise BadFileError(
        file,
        f"{what}; expected one channel, or a palette, whose value is the class",
    )


def _as_its_photo(
    mask: Image.Image, orientation: int, file: str, photo: Photo, photo_file: str
) -> Image.Image:
    """Turns a label image as its photo was turned, or refuses it.

    A mask that is stored upright itself (orientation 1) may belong to the photo as it
    is stored or as it is shown. Sizes decide, unless both have the same.
    """
    if orientation == 1 and photo.orientation != 1:
        swapped = photo.orientation >= 5
        stored = photo.size[::-1] if swapped else photo.size
        if mask.size == photo.size == stored:
            raise BadFileError(
                file,
                f"may be upright or not, as EXIF turns {photo_file}; expected a photo "
                "saved upright, without orientation",
            )
        if mask.size == stored:
            return mask.transpose(_TURNS[photo.orientation])
    if mask.size != photo.size:
        expected = "{}x{}".format(*photo.size)
        raise BadFileError(
            file,
            f"{mask.width}x{mask.height} pixels; expected {expected} as {photo_file}",
        )
    return mask


def open_image(data: bytes, file: str, formats: tuple[str, ...]) -> Image.Image:
    """Opens an image and reads all of it.

    Raises:
      BadFileError: if it has another format, is damaged, is a decompression bomb or
        holds several images. Of the photos of some phones, the first image counts.
    """
    expected = f"expected {', '.join(formats)}"
    try:
        # All threads of a process share its warning filters.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
            several = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        image.load()
    except UnidentifiedImageError:
        raise BadFileError(file, f"not an image of a known kind; {expected}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadFileError(
            file, f"{error}; expected at most {Image.MAX_IMAGE_PIXELS:,} pixels"
        ) from None
    except _DAMAGE as error:
        raise BadFileError(file, f"damaged ({error}); {expected}, whole") from None
    if several:
        raise BadFileError(file, "several images in one file; expected one")
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
