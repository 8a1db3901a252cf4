"""Image files: kept if sound, converted if need be, refused with the reason if not."""

import io
import random
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from train.data.images import (
    BadFileError,
    Photo,
    check_mask,
    check_photo,
    decode,
    encode_png,
)

WIDTH, HEIGHT = 12, 8
PIXELS = np.kron(
    np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8),
    np.ones((4, 4, 1), np.uint8),
)


def picture(mode="RGB"):
    image = Image.fromarray(PIXELS).convert(mode)
    if mode.endswith("A"):
        image.putalpha(128)
    return image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return encoded(picture(), kind, exif=exif, **options)


def png(depth, color, raw, size=(2, 1)):
    """A PNG of any depth, and of any size that it only claims to have."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    for kind, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "JPEG"),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture(), "PNG"),
        encoded(picture(), "WEBP"),
        rotated(1),
    ],
    ids=["jpeg", "progressive", "png", "webp", "upright by exif"],
)
def test_a_plain_file_is_kept_byte_for_byte(data):
    assert check_photo(data, "a") == Photo(data, (WIDTH, HEIGHT))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_one_channel_is_kept_where_one_is_asked_for(kind):
    image = picture("L") if kind != "WEBP" else picture()
    data = encoded(image, kind)
    photo = check_photo(data, "a", channels=1)
    assert (photo.data == data) == (kind != "WEBP")
    with Image.open(io.BytesIO(photo.data)) as kept:
        assert kept.mode == "L"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
        ("P", "GIF"),
        ("L", "BMP"),
    ],
)
def test_other_color_modes_are_converted(mode, kind):
    data = encoded(picture(mode), kind)
    photo = check_photo(data, "a")
    assert photo.size == (WIDTH, HEIGHT)
    with Image.open(io.BytesIO(photo.data)) as kept:
        assert (kept.format, kept.mode) == ("PNG", "RGB")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(photo.data, 3), expected)


# One pixel each: transparent, half transparent, opaque. All are black if alpha is
# dropped.
ALPHA = np.uint8([[0, 128, 255]])
ON_WHITE = np.uint8([[255, 127, 0]])


def black_with_alpha(mode):
    image = Image.new("L" if mode == "LA" else "RGB", (3, 1))
    image.putalpha(Image.fromarray(ALPHA))
    return image


def indices():
    image = Image.fromarray(np.uint8([[0, 1, 2]])).convert("P")
    image.putpalette([0] * 9)
    return image


TRANSPARENT = {
    "RGBA PNG": (encoded(black_with_alpha("RGBA")), ON_WHITE),
    "LA PNG": (encoded(black_with_alpha("LA")), ON_WHITE),
    "lossless WebP": (
        encoded(black_with_alpha("RGBA"), "WEBP", lossless=True),
        ON_WHITE,
    ),
    "RGBA TIFF": (encoded(black_with_alpha("RGBA"), "TIFF"), ON_WHITE),
    "palette": (encoded(indices(), transparency=bytes(ALPHA[0])), ON_WHITE),
    "GIF": (encoded(indices(), "GIF", transparency=0), np.uint8([[255, 0, 0]])),
    "gray with a key": (
        encoded(Image.fromarray(np.uint8([[7, 0, 9]])), transparency=7),
        np.uint8([[255, 0, 9]]),
    ),
    "RGB with a key": (
        encoded(Image.fromarray(np.uint8([[[7] * 3, [0] * 3]])), transparency=(7,) * 3),
        np.uint8([[255, 0]]),
    ),
    "opaque": (encoded(Image.new("RGBA", (1, 1), (9, 9, 9, 255))), np.uint8([[9]])),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("data", "expected"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparent_pixels_lie_on_white(data, expected, channels):
    photo = check_photo(data, "a", channels)
    shown = np.broadcast_to(expected[..., None], (*expected.shape, channels))
    np.testing.assert_array_equal(decode(photo.data, channels), shown)
    assert not Image.open(io.BytesIO(photo.data)).has_transparency_data


@pytest.mark.parametrize(("data", "expected"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_masks_with_transparency_are_refused(data, expected):
    photo = Photo(b"", expected.shape[::-1])
    with pytest.raises(BadFileError, match=r"transparent pixels.*without an alpha"):
        check_mask(data, "m.png", {v: v for v in range(256)}, photo, "p.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_as_their_exif_says(orientation, kind):
    data = rotated(orientation, kind, **{"lossless": True} if kind == "WEBP" else {})
    photo = check_photo(data, "a")
    turned = orientation >= 5
    assert photo.size == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
    assert photo.orientation == orientation
    opened = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode(photo.data, 3), upright)
    assert Image.open(io.BytesIO(photo.data)).getexif().get(0x0112, 1) == 1
    if orientation == 6 and kind != "JPEG":  # by hand: the top of the scene is left
        np.testing.assert_array_equal(upright, np.rot90(PIXELS, -1))


def test_the_first_of_several_pictures_is_taken():
    other = Image.new("RGB", (WIDTH, HEIGHT))
    data = encoded(picture(), "MPO", save_all=True, append_images=[other])
    photo = check_photo(data, "a")  # as many phones write
    assert photo.data == data
    expected = encoded(picture(), "JPEG")
    np.testing.assert_array_equal(decode(photo.data, 3), decode(expected, 3))


@pytest.mark.parametrize(
    ("color", "channels"),
    [(0, 1), (2, 3), (4, 2), (6, 4)],
    ids=["L", "RGB", "LA", "RGBA"],
)
def test_sixteen_bits_are_refused(color, channels):
    data = png(16, color, bytes(1 + 2 * 2 * channels))
    with pytest.raises(BadFileError, match=r"^a\.png: 16 bits; expected 8 bits"):
        check_photo(data, "a.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_tiff_of_more_than_eight_bits_is_refused(dtype):
    data = encoded(Image.fromarray(np.ones((2, 3), dtype)), "TIFF")
    with pytest.raises(BadFileError, match=r"^a\.tif: (16|32) bits; expected 8 bits"):
        check_photo(data, "a.tif")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_images_in_a_file_are_refused(kind):
    other = Image.new("RGB", (WIDTH, HEIGHT))
    data = encoded(picture(), kind, save_all=True, append_images=[other])
    with pytest.raises(BadFileError, match="several images in one file; expected one"):
        check_photo(data, "a")


SOUND = {
    "jpeg": encoded(picture(), "JPEG"),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP"),
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_a_file_cut_off_is_refused(kind, share):
    data = SOUND[kind]
    with pytest.raises(BadFileError, match=r"^cat/a: .*expected JPEG, PNG, WEBP"):
        check_photo(data[: int(share * len(data))], "cat/a")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", SOUND)
def test_a_file_cut_off_anywhere_never_loses_pixels(kind):
    """PIL reads a PNG that lacks no more than its checksum and its end."""
    data = SOUND[kind]
    accepted = []
    for length in range(len(data)):
        try:
            accepted.append(check_photo(data[:length], "a").data)
        except BadFileError:
            continue
    assert len(accepted) < 25
    for part in accepted:
        np.testing.assert_array_equal(decode(part, 3), decode(data, 3))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image at all",
        b"<html><body>404 Not Found</body></html>",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        encoded(picture(), "PPM"),
        encoded(picture(), "ICO"),
    ],
    ids=[
        "empty",
        "text",
        "html",
        "jpeg-header",
        "png-header",
        "ppm",
        "ico",
    ],
)
def test_other_files_are_refused(data):
    with pytest.raises(BadFileError, match=r"^a\.jpg: .*expected JPEG, PNG, WEBP") as e:
        check_photo(data, "a.jpg")
    assert e.value.file == "a.jpg"


# PIL warns above its limit and raises above twice that.
BOMBS = {"warned of": (10_000, 10_000), "an error": (50_000, 50_000)}


@pytest.mark.parametrize("size", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_unpacked(size):
    data = png(8, 2, bytes(1000), size)
    assert len(data) < 200
    with pytest.raises(BadFileError, match=r"expected at most 89,478,485 pixels"):
        check_photo(data, "a.png")
    with pytest.raises(BadFileError, match=r"expected at most 89,478,485 pixels"):
        check_mask(data, "a.png", {0: 0}, Photo(b"", size), "a.jpg")


def test_bombs_are_refused_in_every_thread(monkeypatch):
    """Filters of warnings are shared by all threads."""
    image_open = Image.open

    def slow_open(*args, **kwargs):
        time.sleep(0.001)  # another thread's turn
        return image_open(*args, **kwargs)

    monkeypatch.setattr(Image, "open", slow_open)
    bombs = [png(8, 2, bytes(1000), size) for size in BOMBS.values()]
    files = [*bombs, *SOUND.values()] * 40

    def refused(data):
        try:
            check_photo(data, "a")
        except BadFileError as error:
            return "at most 89,478,485 pixels" in str(error)
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user may have it
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(refused, files))
        assert warnings.filters == before
    assert found == [data in bombs for data in files]


def test_a_large_image_below_the_limit_is_accepted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT)
    assert check_photo(SOUND["png"], "a").data == SOUND["png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(BadFileError, match=f"at most {WIDTH * HEIGHT - 1} pixels"):
        check_photo(SOUND["png"], "a")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of what it passes over
@pytest.mark.parametrize(
    "data",
    [
        *SOUND.values(),
        rotated(6),
        rotated(6, "WEBP"),
        encoded(picture("P"), transparency=bytes(range(99))),
        encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    ],
    ids=[*SOUND, "exif", "exif-webp", "palette", "mpo"],
)
def test_damage_of_any_kind_is_refused_or_harmless(data):
    rng = random.Random(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            if rng.random() < 0.8:
                damaged[place] = rng.choice((0, 255, rng.randrange(256)))
            else:
                del damaged[place : place + 3]
        try:
            photo = check_photo(bytes(damaged), "a")
        except BadFileError:
            refused += 1
        else:
            assert decode(photo.data, 3).shape == (*photo.size[::-1], 3)
    assert refused > 20


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("WEBP", b"MM\0*", b"MM\0?"),  # SyntaxError
    ],
)
def test_damaged_exif_data_are_refused(kind, old, new):
    data = rotated(6, kind)
    assert data.count(old) == 1
    with pytest.raises(BadFileError, match=r"^a\.jpg: damaged EXIF data .*expected"):
        check_photo(data.replace(old, new), "a.jpg")


MASK = np.uint8([[0, 1, 2], [2, 1, 255]])
LABELS = {0, 1, 2, 255}
PHOTO = Photo(b"", (3, 2))


def mask_of(array, mode=None):
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([200, 100, 50] * 256)  # colors say nothing of classes
    return encoded(image)


def check(data, labels=None, photo=PHOTO):
    same = {value: value for value in labels or LABELS}
    return check_mask(data, "m/a.png", same, photo, "p/a.jpg").data


def test_a_grey_mask_is_kept_byte_for_byte():
    data = mask_of(MASK)
    assert check(data) == data


BINARY = np.uint8([[0, 255, 0], [0, 255, 255]])
ONE_BIT = Image.fromarray(BINARY).convert("1")
STORED = {
    # How a mask is stored, and what its values are.
    "palette": (mask_of(MASK, "P"), MASK),
    "palette of one bit": (
        encoded(Image.fromarray(MASK % 2).convert("P"), bits=1),
        MASK % 2,
    ),
    "gray BMP": (encoded(Image.fromarray(MASK), "BMP"), MASK),
    "gray TIFF": (encoded(Image.fromarray(MASK), "TIFF"), MASK),
    "packed TIFF": (
        encoded(Image.fromarray(MASK), "TIFF", compression="tiff_lzw"),
        MASK,
    ),
    "gray GIF": (encoded(Image.fromarray(MASK), "GIF"), MASK),
    "gray as RGB": (encoded(Image.fromarray(MASK).convert("RGB")), MASK),
    "gray as RGB BMP": (encoded(Image.fromarray(MASK).convert("RGB"), "BMP"), MASK),
    "gray WebP": (
        encoded(Image.fromarray(MASK).convert("RGB"), "WEBP", lossless=True),
        MASK,
    ),
    "16 bits": (encoded(Image.fromarray(MASK.astype(np.uint16))), MASK),
    "16 bits TIFF": (encoded(Image.fromarray(MASK.astype(np.uint16)), "TIFF"), MASK),
    "32 bits TIFF": (encoded(Image.fromarray(MASK.astype(np.int32)), "TIFF"), MASK),
    "8 bits": (mask_of(BINARY), BINARY),
    "1 bit": (encoded(ONE_BIT), BINARY),
    "1 bit BMP": (encoded(ONE_BIT, "BMP"), BINARY),
    "1 bit TIFF": (encoded(ONE_BIT, "TIFF"), BINARY),
    "1 bit GIF": (encoded(ONE_BIT, "GIF"), BINARY),
    "1 bit by an optimizer": (
        png(1, 0, b"\0\x40\0\x60", (3, 2)),
        BINARY,
    ),
    "8 bits as RGB": (encoded(Image.fromarray(BINARY).convert("RGB")), BINARY),
}


@pytest.mark.parametrize(("data", "expected"), STORED.values(), ids=STORED)
def test_a_mask_means_the_same_however_it_is_stored(data, expected):
    checked = check(data)
    with Image.open(io.BytesIO(checked)) as image:
        assert (image.format, image.mode) == ("PNG", "L")
    np.testing.assert_array_equal(decode(checked, 1)[..., 0], expected)


@pytest.mark.parametrize("data", [mask_of(BINARY), encoded(ONE_BIT)])
def test_values_get_the_labels_that_they_mean(data):
    mask = check_mask(data, "m", {0: 0, 255: 1}, PHOTO, "p")
    assert mask.values == {0, 255}
    np.testing.assert_array_equal(decode(mask.data, 1)[..., 0], BINARY // 255)


def sized(orientation, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture("L"), kind, exif=exif)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_mask_with_the_orientation_of_its_photo_is_turned_alike(orientation, kind):
    photo = check_photo(rotated(orientation), "p.jpg")
    same = {value: value for value in range(256)}
    mask = check_mask(sized(orientation, kind), "m", same, photo, "p.jpg")
    expected = check_photo(sized(orientation), "m", channels=1)
    np.testing.assert_array_equal(decode(mask.data, 1), decode(expected.data, 1))


@pytest.mark.parametrize("orientation", range(5, 9))
def test_the_sizes_tell_whether_a_mask_is_upright(orientation):
    photo = check_photo(rotated(orientation), "p.jpg")
    same = {value: value for value in range(256)}
    upright = check_photo(sized(orientation), "m", channels=1).data
    for data in (encoded(picture("L")), upright):  # as stored, and as shown
        mask = check_mask(data, "m", same, photo, "p.jpg")
        np.testing.assert_array_equal(decode(mask.data, 1), decode(upright, 1))


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_mask_that_may_be_upright_or_not_is_refused(orientation):
    photo = check_photo(rotated(orientation), "p.jpg")
    same = {value: value for value in range(256)}
    with pytest.raises(BadFileError, match=r"^m: may be upright or not.*p\.jpg.*saved"):
        check_mask(encoded(picture("L")), "m", same, photo, "p.jpg")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mask_of(np.full((2, 3), 7, np.uint8)), "label values 7; expected only"),
        (
            mask_of(np.arange(6, dtype=np.uint8).reshape(2, 3) + 1),
            "label values 3, 4, 5, 6; expected only 0-2, 255",
        ),
        (
            mask_of(np.arange(6, dtype=np.uint8).reshape(2, 3) + 3),
            r"label values 3, 4, 5, 6, 7, \.\.\.; expected only 0-2, 255",
        ),
        (mask_of(np.full((2, 3), 254, np.uint8), "P"), "label values 254; expected"),
        (mask_of(MASK.T.copy()), r"2x3 pixels; expected 3x2 as p/a\.jpg"),
        (mask_of(np.zeros((1, 1), np.uint8)), r"1x1 pixels; expected 3x2"),
        (encoded(Image.new("RGB", (3, 2), (9, 8, 9))), "colors; expected one channel"),
        (encoded(Image.new("CMYK", (3, 2)), "TIFF"), "mode CMYK; expected one channel"),
        (mask_of(np.full((2, 3), 300, np.uint16)), "label values 300; expected only"),
        (
            encoded(Image.fromarray(np.float32(MASK)), "TIFF"),
            "mode F; expected one channel",
        ),
        (
            encoded(Image.fromarray(MASK), "JPEG"),
            "JPEG, which changes values; expected PNG",
        ),
        (encoded(Image.new("L", (3, 2)), "PPM"), "not an image .*expected PNG"),
        (b"text", "not an image .*expected PNG"),
        (mask_of(MASK)[:50], "expected PNG"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(data, message):
    with pytest.raises(BadFileError, match=rf"^m/a\.png: .*{message}"):
        check(data)


def test_labels_are_listed_in_ranges():
    mask = mask_of(np.full((2, 3), 99, np.uint8))
    with pytest.raises(BadFileError, match=r"expected only 0, 2-4, 7-8, 11"):
        check(mask, {0, 2, 3, 4, 7, 8, 11})


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_gives_bytes_of_the_channels_asked_for(mode, channels):
    image = picture(mode)
    array = decode(encoded(image), channels)
    assert (array.shape, array.dtype) == ((HEIGHT, WIDTH, channels), np.uint8)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(array.squeeze(), expected)


def test_encoding_loses_nothing():
    np.testing.assert_array_equal(decode(encode_png(picture()), 3), PIXELS)
