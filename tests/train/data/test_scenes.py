import numpy as np
import pytest
from sklearn.datasets import load_digits

from train.data.preparation import scenes as scenes_module


@pytest.fixture(scope="module")
def digits():
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {"image": images[..., None], "label": digits.target}


@pytest.fixture(scope="module")
def compose(digits):
    def compose(index, *, seed=0, **options):
        return scenes_module.compose(
            digits["image"], digits["label"], seed=seed, index=index, **options
        )

    return compose


@pytest.fixture(scope="module")
def scenes(compose):
    return [compose(index) for index in range(200)]


def test_same_arguments_give_the_same_scene(compose):
    for first, second in zip(compose(3), compose(3), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("other", [{"index": 4}, {"index": 3, "seed": 1}])
def test_index_and_seed_make_another_scene(compose, other):
    assert (compose(3).image != compose(**other).image).mean() > 0.5
    assert (compose(3).mask != compose(**other).mask).any()


@pytest.mark.parametrize("size", [32, 64, 96])
def test_shapes_and_dtypes(compose, size):
    scene = compose(0, size=size)
    assert scene.image.shape == scene.drawing.shape == (size, size, 3)
    assert scene.mask.shape == (size, size)
    assert {part.dtype for part in scene} == {np.dtype(np.uint8)}


def test_arguments_stay_as_they_were(digits):
    images, labels = digits["image"].copy(), digits["label"].copy()
    scenes_module.compose(images, labels, seed=0, index=0)
    np.testing.assert_array_equal(images, digits["image"])
    np.testing.assert_array_equal(labels, digits["label"])


def test_drawing_is_the_mask_in_color(scenes):
    assert (
        len(scenes_module.COLORS)
        == len(set(scenes_module.COLORS))
        == len(scenes_module.CLASS_NAMES)
    )
    for scene in scenes:
        colors = np.array(scenes_module.COLORS)[scene.mask]
        np.testing.assert_array_equal(scene.drawing, colors)


def test_every_class_has_its_share_of_pixels(scenes):
    masks = np.stack([scene.mask for scene in scenes])
    shares = np.bincount(masks.ravel(), minlength=11) / masks.size
    assert len(shares) == 11
    assert 0.75 < shares[0] < 0.9
    assert (shares[1:] > 0.005).all()


@pytest.mark.parametrize("digit", range(10))
def test_label_names_the_digit_drawn(digits, digit):
    of_class = digits["label"] == digit
    scene = scenes_module.compose(
        digits["image"][of_class], digits["label"][of_class], seed=0, index=digit
    )
    assert np.unique(scene.mask).tolist() == [0, digit + 1]


def test_only_placed_digits_are_labeled(monkeypatch):
    # With one try each, blocks often leave the others no place. The dots among them
    # must still be the small ones.
    monkeypatch.setattr(scenes_module, "_TRIES", 1)
    block = np.full((8, 8, 1), 255, np.uint8)
    dot = np.pad(block[:2, :2], ((3, 3), (3, 3), (0, 0)))
    areas = [
        np.bincount(scene.mask.ravel(), minlength=3)
        for scene in (
            scenes_module.compose(
                np.stack([block, dot]), np.arange(2), seed=0, index=index
            )
            for index in range(100)
        )
    ]
    assert max(area[2] for area in areas) < 5 * 100  # a dot is under 10 x 10 pixels
    assert min(area[1] for area in areas if area[1]) > 0.9 * 17**2


def test_each_scene_shows_two_digits_to_five(digits):
    counts = []
    for index in range(200):
        rng = np.random.default_rng(index)
        drawn = digits["image"][index : index + 5]
        inks = scenes_module._place(drawn, 64, rng)
        counts.append(len(inks))
        strokes = [ink > scenes_module._INK for ink in inks]
        for place, stroke in enumerate(strokes):
            covered = np.any(strokes[place + 1 :], axis=0) & stroke
            assert covered.sum() <= 0.1 * stroke.sum()
    assert min(counts) >= 2
    assert np.mean(counts) > 4.9


def test_every_digit_is_brighter_than_the_background(scenes):
    for scene in scenes:
        background = scene.image[scene.mask == 0].mean()
        for label in np.unique(scene.mask)[1:]:
            assert scene.image[scene.mask == label].mean() > background + 30


def test_color_does_not_tell_the_class(scenes):
    images = np.stack([scene.image for scene in scenes])
    masks = np.stack([scene.mask for scene in scenes])
    means = [images[masks == label].mean(axis=0) for label in range(1, 11)]
    within = images[masks > 0].std(axis=0)
    assert (np.std(means, axis=0) < 0.4 * within).all()


def test_shadow_falls_to_the_lower_right(scenes):
    # Background just below and right of a digit against that above and left of it.
    sides = []
    for scene in scenes:
        digit, background = scene.mask > 0, scene.mask == 0
        below = np.zeros_like(digit)
        below[3:, 3:] = digit[:-3, :-3]
        above = np.zeros_like(digit)
        above[:-3, :-3] = digit[3:, 3:]
        lower, upper = background & below & ~above, background & above & ~below
        sides.append(scene.image[lower].mean() - scene.image[upper].mean())
    assert np.mean(sides) < -15
