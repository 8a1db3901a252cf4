import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.errors import UsageError
from train.metrics import confusion_matrix, intersection_over_union, psnr, ssim


def images(seed, shape=(3, 24, 31, 3)):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def degraded(image, by=0.2):
    return np.clip(image + by * images(7, image.shape) - by / 2, 0, 1)


def test_confusion_matrix_counts_each_pair_that_counts():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, (2, 5, 6, 7))
    counted = random.random((5, 6, 7)) < 0.7
    expected = np.zeros((4, 4), int)
    for t, p in zip(truth[counted], predicted[counted], strict=True):
        expected[t, p] += 1
    truth[~counted & (truth > 1)] = 255  # no class; others are just not counted
    found = jax.jit(confusion_matrix, static_argnums=3)(
        jnp.asarray(truth, jnp.uint8), predicted, counted, 4
    )
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_confusion_matrix_holds_more_than_float32_can_count():
    full = jnp.full((1, 1), 2**24, jnp.int32)
    one = confusion_matrix(jnp.zeros(1, int), jnp.zeros(1, int), jnp.ones(1, bool), 1)
    assert (full + one).item() == 2**24 + 1


def test_a_batch_that_int32_cannot_count_is_refused():
    pixels = jax.ShapeDtypeStruct((2, 2**15, 2**15), jnp.uint8)
    one_less = jax.ShapeDtypeStruct((2**31 - 1,), jnp.uint8)

    def count(pixels):
        return confusion_matrix(pixels, pixels, pixels < 2, 2)

    assert jax.eval_shape(count, one_less).shape == (2, 2)
    with pytest.raises(UsageError, match=r"2,147,483,648 pixels .* smaller batch_size"):
        jax.eval_shape(count, pixels)


def test_iou_of_a_confusion_matrix():
    # A class that is right, one mixed with another, one only predicted, one nowhere.
    confusion = np.array(
        [
            [4, 0, 0, 0, 0],
            [0, 2, 1, 1, 0],
            [0, 1, 5, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    found = intersection_over_union(confusion)
    np.testing.assert_allclose(found, [1, 2 / 5, 5 / 7, 0, np.nan])


def test_psnr_of_a_known_error():
    a = images(0)
    b = np.clip(a, 0.1, 0.9)
    expected = [
        10 * np.log10(1 / np.square(x - y).mean()) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)
    assert psnr(a, a).tolist() == pytest.approx([100] * 3)


def reference_ssim(a, b):
    """From the paper, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    values = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            x, y = (
                image[row : row + 11, column : column + 11].astype(np.float64)
                for image in (a, b)
            )
            mx, my = ((weights * z).sum((0, 1)) for z in (x, y))
            vx, vy = (
                (weights * (z - m) ** 2).sum((0, 1)) for z, m in ((x, mx), (y, my))
            )
            cov = (weights * (x - mx) * (y - my)).sum((0, 1))
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mx * my + c1)
                * (2 * cov + c2)
                / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return np.mean(values)


@pytest.mark.parametrize("by", [0.02, 0.2, 0.8])
def test_ssim_is_that_of_the_paper(by):
    a = images(0)
    b = degraded(a, by)
    expected = [reference_ssim(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, atol=2e-6)
    np.testing.assert_allclose(ssim(b, a), ssim(a, b), atol=1e-6)


def test_ssim_falls_with_the_error():
    a = images(0)
    found = [float(ssim(a, degraded(a, by)).mean()) for by in (0, 0.1, 0.3, 0.9)]
    assert found[0] == pytest.approx(1)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = images(0)
    b = degraded(a)
    expected = [
        metrics.structural_similarity(
            x,
            y,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b), expected, atol=1e-5)


def test_ssim_of_images_below_its_window_is_refused():
    with pytest.raises(ValueError, match="at least 11x11, got 10x31"):
        ssim(jnp.zeros((1, 10, 31, 1)), jnp.zeros((1, 10, 31, 1)))
