"""The counts, means and sums of metrics against NumPy in float64, at critical sizes.

The images and logits here are matrix products, as the output of a network is: jaxlib
0.10.2 computes some reductions wrongly on CPUs if they are fused with such a product
(jax-ml/jax#39103, see docs/numerics.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.metrics import confusion_matrix, psnr, ssim

SIZES = [2**15 - 1, 2**15, 2**15 + 1, 40_000, 2**16 - 1, 2**16 + 1, 2**20]
every_size = pytest.mark.parametrize("n", SIZES)
MATRIX = np.diag([1.0, 2.0, 3.0]) + 0.25


def make_features(n):
    return np.random.default_rng(n).uniform(size=(n, 3)).astype(np.float32)


def head(features):
    """A network's last layer, per example or pixel."""
    return jax.vmap(lambda x: jnp.asarray(MATRIX, x.dtype) @ x)(features)


@every_size
def test_confusion_matrix(n):
    random = np.random.default_rng(n)
    truth, predicted = random.integers(0, 5, (2, n))
    counted = random.random(n) < 0.9
    truth[~counted] = 255
    expected = np.zeros((5, 5), np.int64)
    np.add.at(expected, (truth[counted], predicted[counted]), 1)
    found = jax.jit(confusion_matrix, static_argnums=3)(
        truth.astype(np.uint8), predicted, counted, 5
    )
    np.testing.assert_array_equal(found, expected)


@every_size
def test_confusion_matrix_of_predictions_from_logits(n):
    features = make_features(n)
    truth = np.arange(n) % 3
    scores = features.astype(np.float64) @ MATRIX.T
    # Rounding may decide between scores that are nearly equal.
    counted = np.diff(np.sort(scores), axis=1)[:, -1] > 1e-5
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (truth[counted], scores.argmax(1)[counted]), 1)

    @jax.jit
    def count(features):
        return confusion_matrix(truth, head(features).argmax(-1), counted, 3)

    np.testing.assert_array_equal(count(features), expected)


@every_size
def test_loss_sums(n):
    features, labels = make_features(n), np.arange(n) % 3
    weights = (np.arange(n) % 7 != 0).astype(np.float32)

    @jax.jit
    def sums(features, weights):
        losses = optax.softmax_cross_entropy_with_integer_labels(head(features), labels)
        return (losses * weights).sum(), weights.sum(), losses.mean(), losses

    logits = features.astype(np.float64) @ MATRIX.T
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), labels]
    total, count, mean, each = sums(features, weights)
    np.testing.assert_allclose(each, losses, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, (losses * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(mean, losses.mean(), rtol=1e-5)
    assert count == weights.sum(dtype=np.float64)


@every_size
@pytest.mark.parametrize("many", [True, False], ids=["many-small", "one-large"])
def test_psnr_means(n, many):
    features = make_features(n)
    shape = (n, 1, 1, 3) if many else (1, n, 1, 3)
    target = np.random.default_rng(n + 1).uniform(size=shape).astype(np.float32)
    found = jax.jit(lambda x: psnr(head(x).reshape(shape) / 4, target))(features)
    images = (features.astype(np.float64) @ MATRIX.T).reshape(shape) / 4
    error = np.square(images - target).mean((1, 2, 3))
    np.testing.assert_allclose(found, -10 * np.log10(error), rtol=1e-5, atol=1e-4)


def expected_ssim(a, b):
    """The definition, for images of the size of the window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = (np.outer(line, line) / line.sum() ** 2)[None, :, :, None]
    mean = lambda x: (weights * x).sum((1, 2))  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    covariance = mean(a * b) - mean_a * mean_b
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean(-1)


@pytest.mark.parametrize("n", [2**15, 2**15 + 1])
@pytest.mark.slow
def test_ssim_means(n):
    random = np.random.default_rng(n)
    pattern = random.uniform(size=(1, 11, 11, 1)).astype(np.float32)
    features = make_features(n)
    target = random.uniform(size=(n, 1, 1, 3)).astype(np.float32) * pattern

    @jax.jit
    def found(features):
        return ssim(head(features).reshape(n, 1, 1, 3) / 4 * pattern, target)

    images = (features.astype(np.float64) @ MATRIX.T).reshape(n, 1, 1, 3) / 4 * pattern
    expected = np.concatenate(
        [
            expected_ssim(images[i : i + 4096], target[i : i + 4096].astype(np.float64))
            for i in range(0, n, 4096)
        ]
    )
    np.testing.assert_allclose(found(features), expected, atol=1e-4)
