import collections
import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from train.data import augment

KEY = jax.random.key(0)
EXAMPLES, HEIGHT, WIDTH = 24, 96, 80

GEOMETRIC = {
    "pad_crop": augment.pad_crop(5),
    "random_crop": augment.random_crop((64, 48)),
    "center_crop": augment.center_crop((64, 48)),
    "random_flip": augment.random_flip(),
    "random_resized_crop": augment.random_resized_crop((32, 24)),
    "random_scale_crop": augment.random_scale_crop((80, 72)),
}
PHOTOMETRIC = {
    "color_jitter": augment.color_jitter(hue=0.1),
    "cutout": augment.cutout(8),
    "normalize": augment.normalize(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
}
CHAIN = augment.chain(
    GEOMETRIC["random_scale_crop"], GEOMETRIC["random_flip"], *PHOTOMETRIC.values()
)
ALL = GEOMETRIC | PHOTOMETRIC | {"chain": CHAIN}
SIZES = {
    "random_crop": (64, 48),
    "center_crop": (64, 48),
    "random_resized_crop": (32, 24),
    "random_scale_crop": (80, 72),
    "chain": (80, 72),
}
PADDED = {"pad_crop", "random_scale_crop"}
RESAMPLED = {"random_resized_crop", "random_scale_crop"}
FLOAT_OUTPUT = {"color_jitter", "normalize", "chain"}
DETERMINISTIC = {"center_crop", "normalize"}

geometric = pytest.mark.parametrize("name", GEOMETRIC)
photometric = pytest.mark.parametrize("name", PHOTOMETRIC)
every = pytest.mark.parametrize("name", ALL)
some = pytest.mark.parametrize("name", ["pad_crop", "random_scale_crop", "cutout"])

TRACES = collections.Counter()


def jitted(name):
    def counted(key, batch):
        TRACES[name] += 1
        return ALL[name](key, batch)

    return jax.jit(counted)


JITTED = {name: jitted(name) for name in ALL}


def run(name, batch, seed=0):
    return jax.device_get(JITTED[name](jax.random.key(seed), batch))


def apply(augmentation, **batch):
    return jax.device_get(jax.jit(augmentation)(KEY, batch))


def noise(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def make_batch(image=None, mask=None):
    """All entries there may be, so that most tests share a compilation."""
    if image is None:
        image = noise(EXAMPLES, HEIGHT, WIDTH, 3)
    if mask is None:
        mask = image[..., 0] // 2
    return {
        "image": image,
        "input": image,
        "target": image[..., :1],
        "mask": mask,
        "label": np.arange(EXAMPLES),
        "weight": np.linspace(0, 1, EXAMPLES, dtype=np.float32),
    }


def blocks():
    """Labels 1 to 12 in blocks of 16x16 pixels, and an image that encodes them."""
    shape = (EXAMPLES, HEIGHT // 16, WIDTH // 16)
    labels = np.random.default_rng(0).integers(1, 13, shape, dtype=np.uint8)
    mask = labels.repeat(16, axis=1).repeat(16, axis=2)
    return make_batch(np.repeat(20 * mask[..., None], 3, axis=-1), mask)


def positions(examples=EXAMPLES, height=HEIGHT, width=WIDTH):
    """An image whose first two channels are the positions (y, x) of pixel centers."""
    grid = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.float32) + 0.5
    grid = np.concatenate([grid, np.zeros_like(grid[..., :1])], axis=-1)
    return np.broadcast_to(grid, (examples, *grid.shape))


# What all augmentations have in common.


@every
def test_shapes_and_dtypes(name):
    out = run(name, make_batch())
    size = SIZES.get(name, (HEIGHT, WIDTH))
    assert out["image"].shape == (EXAMPLES, *size, 3)
    assert out["image"].dtype == (np.float32 if name in FLOAT_OUTPUT else np.uint8)
    assert out["mask"].shape == (EXAMPLES, *size)
    assert out["mask"].dtype == np.uint8


@geometric
def test_geometry_keeps_float32(name):
    image = noise(EXAMPLES, HEIGHT, WIDTH, 3)
    floats = run(name, make_batch(image.astype(np.float32), image[..., 0]))["image"]
    assert floats.dtype == np.float32
    rounded = run(name, make_batch(image))["image"]
    np.testing.assert_allclose(floats, rounded.astype(np.float32), atol=0.501)


@every
def test_other_entries_pass_through(name):
    batch = make_batch()
    out = run(name, batch)
    assert out.keys() == batch.keys()
    for entry in ("label", "weight"):
        np.testing.assert_array_equal(out[entry], batch[entry])


@photometric
def test_photometric_ones_leave_all_but_the_image(name):
    batch = make_batch()
    out = run(name, batch)
    for entry in ("mask", "input", "target"):
        np.testing.assert_array_equal(out[entry], batch[entry])


@every
def test_result_is_a_function_of_the_key(name):
    first, again, other = (run(name, make_batch(), seed)["image"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first == other).all() == (name in DETERMINISTIC)


@every
def test_keys_share_one_compilation(name):
    before = TRACES[name]
    for seed in range(3):
        run(name, make_batch(), seed)
    assert TRACES[name] <= before + 1


@every
def test_examples_are_treated_differently(name):
    image = np.broadcast_to(noise(1, HEIGHT, WIDTH, 3), (EXAMPLES, HEIGHT, WIDTH, 3))
    out = run(name, make_batch(image))["image"]
    distinct = len({example.tobytes() for example in out})
    if name in DETERMINISTIC:
        assert distinct == 1
    elif name == "random_flip":
        assert distinct == 2
    else:
        assert distinct > EXAMPLES / 2


@some
def test_eager_equals_jitted(name):
    entries = ("image", "mask")
    eager = ALL[name](KEY, {entry: make_batch()[entry] for entry in entries})
    compiled = run(name, make_batch())
    for entry in entries:
        x, y = (np.asarray(out[entry], float) for out in (eager, compiled))
        # Where compilers round differently, uint8 may come out one apart.
        np.testing.assert_allclose(x, y, atol=1)
        assert (np.abs(x - y) < 1e-4).mean() > 0.99


@some
def test_vmap_over_keys(name):
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    both = jax.jit(jax.vmap(ALL[name], (0, None)))(keys, make_batch())["mask"]
    for seed, mask in enumerate(both):
        np.testing.assert_array_equal(mask, run(name, make_batch(), seed)["mask"])


# Pictures of an example stay aligned.


@geometric
def test_masks_gain_no_label_but_the_ignored_one(name):
    batch = blocks()
    padding = {255} if name in PADDED else set()
    found = set()
    for seed in range(3):
        found |= set(np.unique(run(name, batch, seed)["mask"]))
    assert padding <= found <= set(np.unique(batch["mask"])) | padding


@geometric
def test_image_and_mask_stay_aligned(name):
    out = run(name, blocks())
    expected = np.where(out["mask"] == 255, 0, 20 * out["mask"])
    # Where labels are constant around a pixel, interpolation has nothing to mix: it
    # reaches one pixel of the source or of the result, and zoom is below 3.
    radius = 3 if name in RESAMPLED else 0
    around = np.lib.stride_tricks.sliding_window_view(
        out["mask"], (2 * radius + 1, 2 * radius + 1), axis=(1, 2)
    )
    constant = around.min((-2, -1)) == around.max((-2, -1))
    assert constant.mean() > 0.1
    inner = slice(radius, -radius or None)
    np.testing.assert_array_equal(
        out["image"][:, inner, inner][constant],
        np.repeat(expected[:, inner, inner, None], 3, axis=-1)[constant],
    )


@geometric
@pytest.mark.parametrize("axis", [0, 1])
def test_masks_are_read_at_the_points_of_images(name, axis):
    image = positions()
    mask = image[..., axis].astype(np.uint8)  # the row or column of each pixel
    out = run(name, make_batch(image, mask))
    distance = np.abs(out["image"][..., axis] - (out["mask"] + 0.5))
    # Near the border, means lack pixels on one side.
    inside = (out["mask"] > 4) & (out["mask"] < mask.max() - 4)
    assert inside.mean() > 0.2
    # The point lies in the pixel read, but for what a mean of few pixels is off.
    assert distance[inside].max() <= (0.55 if name in RESAMPLED else 0)


@geometric
def test_input_and_target_stay_aligned(name):
    out = run(name, make_batch())
    np.testing.assert_array_equal(out["input"], out["image"])
    np.testing.assert_array_equal(out["target"], out["image"][..., :1])


@pytest.mark.parametrize("name", sorted(PADDED))
def test_padding_is_black_and_ignored(name):
    out = run(name, blocks())  # nowhere black
    assert (out["mask"] == 255).any()
    np.testing.assert_array_equal(out["mask"] == 255, (out["image"] == 0).all(-1))


@pytest.mark.parametrize(
    "augmentation",
    [
        augment.pad_crop(2, ignore_label=11),
        augment.random_scale_crop((20, 20), scale=(0.5, 0.6), ignore_label=11),
    ],
    ids=["pad_crop", "random_scale_crop"],
)
def test_ignore_label_can_be_chosen(augmentation):
    out = apply(augmentation, mask=np.zeros((8, 20, 20), np.uint8))
    assert set(np.unique(out["mask"])) == {0, 11}


# One by one, against references.


def assert_same_set(results, references):
    """Every result is one of the references, and each of these occurs."""
    results = {np.asarray(x).tobytes() for x in results}
    assert results == {np.asarray(x).tobytes() for x in references}


def test_pad_crop_gives_every_shift():
    image, mask = noise(5, 6, 3), noise(5, 6) // 2
    out = apply(
        augment.pad_crop(2),
        image=np.broadcast_to(image, (800, 5, 6, 3)),
        mask=np.broadcast_to(mask, (800, 5, 6)),
    )
    padded_image = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    padded_mask = np.pad(mask, 2, constant_values=255)
    shifts = list(itertools.product(range(5), range(5)))
    assert_same_set(
        out["image"], [padded_image[t : t + 5, u : u + 6] for t, u in shifts]
    )
    assert_same_set(out["mask"], [padded_mask[t : t + 5, u : u + 6] for t, u in shifts])


def test_pad_crop_without_padding_is_the_identity():
    image = noise(3, 5, 6, 3)
    out = apply(augment.pad_crop(0), image=image)
    np.testing.assert_array_equal(out["image"], image)


def test_random_crop_gives_every_place():
    image = noise(5, 6, 3)
    out = apply(
        augment.random_crop((2, 5)), image=np.broadcast_to(image, (400, 5, 6, 3))
    )
    places = itertools.product(range(4), range(2))
    assert_same_set(out["image"], [image[t : t + 2, u : u + 5] for t, u in places])


def test_center_crop_leaves_equal_margins():
    image = noise(1, 8, 7, 3)
    out = apply(augment.center_crop((4, 4)), image=image)["image"]
    np.testing.assert_array_equal(out, image[:, 2:6, 1:5])


def test_random_flip_twice_is_the_identity():
    batch = blocks()
    once = run("random_flip", batch)
    twice = run("random_flip", once)
    for entry in ("image", "mask"):
        np.testing.assert_array_equal(twice[entry], batch[entry])
        flipped = (once[entry] == batch[entry][:, :, ::-1]).reshape(EXAMPLES, -1)
        assert 0 < flipped.all(1).mean() < 1


@pytest.mark.parametrize("probability", [0, 0.2, 1])
def test_random_flip_flips_with_its_probability(probability):
    image = np.broadcast_to(noise(1, 1, 4, 1), (2000, 1, 4, 1))
    out = apply(augment.random_flip(probability), image=image)["image"]
    flipped = (out == image[:, :, ::-1]).reshape(2000, -1).all(1)
    assert flipped.mean() == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    "augmentation",
    [
        augment.random_resized_crop((32, 32), scale=(1, 1), ratio=(1, 1)),
        augment.random_scale_crop((32, 32), scale=(1, 1)),
    ],
)
def test_resampling_everything_at_its_size_is_the_identity(augmentation):
    batch = {"image": noise(4, 32, 32, 3), "mask": noise(4, 32, 32)}
    out = apply(augmentation, **batch)
    np.testing.assert_array_equal(out["image"], batch["image"])
    np.testing.assert_array_equal(out["mask"], batch["mask"])


@pytest.mark.parametrize("size", [(20, 12), (70, 90), (50, 20)])
def test_resizing_all_of_a_picture_matches_pillow(size):
    # Sides are odd so that no point lies between two pixels.
    batch = {"image": noise(1, 47, 41, 3), "mask": noise(1, 47, 41)}
    # Of this ratio only, a box has all of the area.
    augmentation = augment.random_resized_crop(size, scale=(1, 1))
    out = apply(augmentation, **batch)
    image, mask = (Image.fromarray(batch[entry][0]) for entry in ("image", "mask"))
    expected = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), int)
    assert np.abs(out["image"][0] - expected).max() <= 1
    expected = np.asarray(mask.resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(out["mask"][0], expected)


def boxes_of(points):
    """(top, left) and (height, width) of boxes, from the positions read in them."""
    _, height, width, _ = points.shape
    corners, sides = [], []
    for line in points[:, :, width // 2, 0], points[:, height // 2, :, 1]:
        # A quarter of the box on either side may see the border of the picture.
        n = line.shape[1]
        inner = np.arange(n // 4, n - n // 4)
        slope, corner = np.polyfit(inner + 0.5, line[:, inner].T, 1)
        corners.append(corner)
        sides.append(slope * n)
    return np.stack(corners, -1), np.stack(sides, -1)


def test_resizing_random_boxes_matches_pillow():
    size = (24, 24)
    smooth = np.asarray(
        Image.fromarray(noise(6, 5, 3)).resize((80, 96), Image.Resampling.BICUBIC)
    )
    batch = {
        "image": np.broadcast_to(smooth, (16, *smooth.shape)),
        "input": positions(16, 96, 80),
    }
    augmentation = augment.random_resized_crop(size, scale=(0.05, 0.5))
    out = apply(augmentation, **batch)
    corners, sides = boxes_of(out["input"])
    corners, ends = np.maximum(corners, 0), np.minimum(corners + sides, (96, 80))
    for image, (top, left), (bottom, right) in zip(
        out["image"], corners, ends, strict=True
    ):
        expected = Image.fromarray(smooth).resize(
            size, Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
        assert np.abs(image - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (90, 40)])
def test_random_resized_crop_draws_boxes_as_documented(shape):
    size, area = (16, 16), shape[0] * shape[1]
    augmentation = augment.random_resized_crop(size, scale=(0.1, 0.5), ratio=(0.8, 1.5))
    out = apply(augmentation, input=positions(512, *shape))["input"]
    corners, sides = boxes_of(out)
    assert (corners > -0.3).all()
    assert (corners + sides < np.asarray(shape) + 0.3).all()
    share, ratio = sides.prod(1) / area, sides[:, 1] / sides[:, 0]
    assert share.min() > 0.1 * 0.97
    assert share.max() < 0.5 * 1.03
    np.testing.assert_allclose(
        np.quantile(share, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.03
    )
    assert ratio.min() > 0.8 * 0.97 or shape == (90, 40)
    assert ratio.max() < 1.5 * 1.03
    if shape == (64, 64):  # where all boxes fit
        assert np.log(ratio).mean() == pytest.approx(np.log(0.8 * 1.5) / 2, abs=0.03)
    # The places are uniform over the room there is.
    place = corners / (np.asarray(shape) - sides)
    np.testing.assert_allclose(place.mean(0), 0.5, atol=0.06)


def test_random_scale_crop_draws_factors_as_documented():
    size = (40, 40)
    batch = {"input": positions(512, 40, 60), "mask": np.zeros((512, 40, 60), np.uint8)}
    augmentation = augment.random_scale_crop(size, scale=(0.8, 1.6))
    out = apply(augmentation, **batch)
    _, sides = boxes_of(out["input"])
    factors = size / sides
    np.testing.assert_allclose(factors[:, 0], factors[:, 1], rtol=0.02)
    np.testing.assert_allclose(
        np.quantile(factors[:, 0], [0, 0.25, 0.5, 0.75, 1]),
        [0.8, 1.0, 1.2, 1.4, 1.6],
        atol=0.06,
    )
    # All of the height shows where it is smaller than the crop, at any place; nothing
    # is padded where it is larger.
    rows = (out["mask"] == 0).any(2)
    expected = np.minimum(40, 40 * factors[:, 0])
    assert (np.abs(rows.sum(1) - expected) <= 1.5).all()
    assert (out["mask"] == 0).any(1).all()  # 60 * 0.8 > 40 columns
    smallest = factors[:, 0] < 0.9
    assert len(set(rows[smallest].argmax(1))) >= 6


def test_bilinear_weights_do_not_overflow():
    image = np.full((64, 30, 50, 1), 255, np.uint8)
    out = apply(augment.random_resized_crop((17, 31)), image=image)
    assert (out["image"] == 255).all()


LUMA = np.asarray([0.299, 0.587, 0.114])


@pytest.mark.parametrize(
    ("strengths", "origin"),
    [
        ((0.5, 0, 0), lambda image: 0 * image),
        ((0, 0.5, 0), lambda image: (image @ LUMA).mean((1, 2)).reshape(-1, 1, 1, 1)),
        ((0, 0, 0.5), lambda image: (image @ LUMA)[..., None]),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_color_jitter_stretches_from_its_origin(strengths, origin):
    image = noise(64, 6, 5, 3)
    image[:, 0, 0] = 100, 120, 110  # cut off by no factor
    out = apply(augment.color_jitter(*strengths), image=image)["image"]
    start = origin(image.astype(float))
    difference = image - start
    factor = ((out - start)[:, 0, 0, 1] / difference[:, 0, 0, 1]).reshape(-1, 1, 1, 1)
    expected = np.clip(start + factor * difference, 0, 255)
    np.testing.assert_allclose(out, expected, atol=0.02)
    assert 0.5 <= factor.min() < 0.6
    assert 1.4 < factor.max() <= 1.501


def test_saturation_goes_down_to_grey():
    pixel = np.asarray([100, 120, 110], np.uint8).reshape(1, 1, 1, 3)
    image = np.broadcast_to(pixel, (1000, 1, 1, 3))
    out = apply(augment.color_jitter(0, 0, 2.0), image=image)["image"]
    difference = out[..., 1] - out[..., 0]  # 20 times a factor
    assert 0 <= difference.min() < 0.3
    assert 59 < difference.max() <= 60.001
    np.testing.assert_allclose(out @ LUMA, image @ LUMA, atol=0.01)


def test_color_jitter_turns_hue_as_colorsys():
    image = noise(40, 4, 4, 3)
    image[:, 0] = np.asarray([[9, 9, 9], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    image[:, 1, 0] = 0
    out = apply(augment.color_jitter(0, 0, 0, hue=0.3), image=image)["image"]
    to_hsv = np.vectorize(colorsys.rgb_to_hsv, signature="(),(),()->(),(),()")
    before = np.stack(to_hsv(*np.moveaxis(image / 255.0, -1, 0)))
    # Pure red tells the turn of each example.
    turn = np.stack(to_hsv(*np.moveaxis(np.asarray(out) / 255.0, -1, 0)))[0, :, 0, 1]
    turn = (turn + 0.5) % 1 - 0.5
    assert -0.3 <= turn.min() < -0.25
    assert 0.25 < turn.max() <= 0.3
    before[0] = (before[0] + turn.reshape(-1, 1, 1)) % 1
    to_rgb = np.vectorize(colorsys.hsv_to_rgb, signature="(),(),()->(),(),()")
    expected = 255 * np.stack(to_rgb(*before), axis=-1)
    np.testing.assert_allclose(out, expected, atol=0.01)


def test_color_jitter_by_nothing_is_the_identity():
    image = noise(4, 8, 8, 3)
    out = apply(augment.color_jitter(0, 0, 0, 0), image=image)["image"]
    np.testing.assert_array_equal(out, image.astype(np.float32))


def test_images_of_one_channel_have_no_color_to_jitter():
    image = noise(4, 8, 8, 1)
    color = apply(augment.color_jitter(0, 0, 1.0, 0.5), image=image)["image"]
    np.testing.assert_array_equal(color, image.astype(np.float32))
    both = apply(augment.color_jitter(0.5, 0.5), image=image)["image"]
    assert both.shape == image.shape
    assert not (both == image).all()


def test_color_jitter_stays_in_range():
    image = noise(64, 8, 8, 3)
    out = apply(augment.color_jitter(2.0, 2.0, 2.0, 0.5), image=image)["image"]
    assert out.min() >= 0
    assert out.max() <= 255


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutout_holes_are_squares_around_every_pixel(size):
    out = apply(augment.cutout(size), image=np.ones((600, 4, 5, 2), np.float32))
    references = []
    for row, column in itertools.product(range(4), range(5)):
        reference = np.ones((4, 5, 2), np.float32)
        top, left = row - size // 2, column - size // 2
        reference[max(top, 0) : top + size, max(left, 0) : left + size] = 0
        references.append(reference)
    assert_same_set(out["image"], references)


def test_cutout_keeps_uint8():
    out = apply(augment.cutout(2), image=noise(2, 4, 4, 3))["image"]
    assert out.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize_matches_numpy(dtype):
    image = noise(4, 5, 6, 3).astype(dtype)
    out = apply(ALL["normalize"], image=image)["image"]
    expected = (image / 255.0 - (0.4, 0.5, 0.6)) / (0.2, 0.25, 0.3)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_empty_chain_is_the_identity():
    batch = blocks()
    assert augment.chain()(KEY, batch) is batch


def test_chain_applies_in_order_with_different_keys():
    image = np.ones((64, 9, 9, 1), np.float32)
    hole = augment.cutout(1)
    twice = apply(augment.chain(hole, hole), image=image)["image"]
    assert (twice == 0).sum((1, 2, 3)).max() == 2
    normalize = augment.normalize(mean=(0.5,), std=(0.5,))
    last = apply(augment.chain(normalize, hole), image=image)["image"]
    first = apply(augment.chain(hole, normalize), image=image)["image"]
    assert (last == 0).any()
    assert (first == -1).any()


# Mistakes.


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: augment.pad_crop(-1), "padding .* at least 0, got -1"),
        (lambda: augment.pad_crop(1.5), "padding .* whole number .* got 1.5"),
        (lambda: augment.pad_crop(ignore_label=256), "ignore_label .* 255, got 256"),
        (lambda: augment.random_crop(32), r"size must be \(height, width\).* got 32"),
        (lambda: augment.random_crop((32, 0)), r"size .* got \(32, 0\)"),
        (lambda: augment.center_crop((8, 8, 3)), r"size .* got \(8, 8, 3\)"),
        (lambda: augment.random_flip(1.1), "probability .* from 0 to 1, got 1.1"),
        (lambda: augment.random_flip(float("nan")), "probability .* got nan"),
        (
            lambda: augment.random_resized_crop((8, 8), scale=(0.5, 1.5)),
            r"scale .* at most 1, got \(0.5, 1.5\)",
        ),
        (lambda: augment.random_resized_crop((8, 8), scale=0.5), "scale .* got 0.5"),
        (
            lambda: augment.random_resized_crop((8, 8), ratio=(2, 1)),
            r"ratio .* low <= high.* got \(2, 1\)",
        ),
        (
            lambda: augment.random_scale_crop((8, 8), scale=(0, 1)),
            r"scale .* above 0, got \(0, 1\)",
        ),
        (
            lambda: augment.random_scale_crop((8, 8), scale=(1, float("inf"))),
            r"scale .* got \(1, inf\)",
        ),
        (
            lambda: augment.random_scale_crop((8, 8), ignore_label=-1),
            "ignore_label .* got -1",
        ),
        (lambda: augment.color_jitter(-0.1), "brightness .* at least 0, got -0.1"),
        (lambda: augment.color_jitter(0, -1), "contrast .* got -1"),
        (lambda: augment.color_jitter(0, 0, float("inf")), "saturation .* got inf"),
        (lambda: augment.color_jitter(hue=0.6), "hue .* from 0 to 0.5, got 0.6"),
        (lambda: augment.cutout(0), "size .* at least 1, got 0"),
        (lambda: augment.normalize((125.3,), (0.2,)), r"mean .* got \(125.3,\)"),
        (lambda: augment.normalize((0.5,), (0,)), r"std .* above 0.* got \(0,\)"),
        (lambda: augment.normalize((0.5,), (0.1, 0.1)), "std .* as long as mean, 1"),
    ],
)
def test_arguments_are_checked(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


@pytest.mark.parametrize("crop", [augment.random_crop, augment.center_crop])
def test_crop_larger_than_pictures_names_both(crop):
    with pytest.raises(ValueError, match="97x80 does not fit pictures of 96x80: crop"):
        jax.jit(crop((97, 80)))(KEY, blocks())


def test_pictures_must_agree():
    batch = blocks()
    batch["mask"] = batch["mask"][:, 1:]
    with pytest.raises(ValueError, match=r"all alike .* 'mask': \(24, 95, 80\)"):
        augment.random_flip()(KEY, batch)
    with pytest.raises(ValueError, match=r"needs 'image'.*got \['label'\]"):
        augment.random_flip()(KEY, {"label": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"\(examples, height, width, channels\)"):
        augment.random_flip()(KEY, {"image": batch["image"][..., 0]})


@photometric
def test_photometric_ones_need_an_image(name):
    with pytest.raises(ValueError, match=r"needs 'image' .* got \['input'\]"):
        ALL[name](KEY, {"input": blocks()["image"]})


@pytest.mark.parametrize("name", ["color_jitter", "normalize"])
def test_number_of_channels_is_checked(name):
    with pytest.raises(ValueError, match=r"3 channels, got .*4"):
        ALL[name](KEY, {"image": noise(2, 8, 8, 4)})
