"""Metrics of batches, computed on the device, and scores from their sums."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from train.errors import UsageError

# The settings of SSIM in its paper.
_WINDOW_SIZE = 11
_WINDOW_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03

_LARGEST_PSNR = 100.0


def confusion_matrix(
    truth: Int[Array, "..."],
    predicted: Int[Array, "..."],
    counted: Bool[Array, "..."],
    num_classes: int,
) -> Int32[Array, "classes classes"]:
    """Counts how often each class was predicted for each true class.

    >>> import jax.numpy as jnp
    >>> truth, predicted = jnp.array([0, 1, 1, 255]), jnp.array([0, 0, 1, 1])
    >>> confusion_matrix(truth, predicted, truth != 255, 2).tolist()
    [[1, 0], [1, 1]]

    Args:
      truth: the true classes; any values where `counted` is False.
      predicted: the predicted classes, below `num_classes`.
      counted: which entries count.
      num_classes: number of classes.

    Returns:
      The counts, with the true classes in rows.

    Raises:
      UsageError: if there are 2**31 entries or more.
    """
    if truth.size >= 2**31:
        raise UsageError(
            f"a batch of {truth.size:,} pixels is too large to be counted: choose a "
            "smaller batch_size"
        )
    cells = num_classes * truth.astype(jnp.int32) + predicted
    cells = jnp.where(counted, cells, num_classes**2).ravel()  # beyond the end
    counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode="drop")
    return counts.reshape(num_classes, num_classes)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class.

    Of the pixels whose true or predicted class it is, this is the share of those where
    it is both.

    >>> import numpy as np
    >>> intersection_over_union(np.array([[2, 1, 0], [1, 0, 0], [0, 0, 0]])).tolist()
    [0.5, 0.0, nan]

    Args:
      confusion: counts (classes, classes), with the true classes in rows.

    Returns:
      float64 (classes,); NaN for classes that occur neither in truth nor in prediction.
    """
    both = np.diagonal(confusion)
    either = confusion.sum(axis=0, dtype=float) + confusion.sum(axis=1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def psnr(
    a: Float[Array, "batch height width channels"],
    b: Float[Array, "batch height width channels"],
) -> Float[Array, " batch"]:
    """Returns the peak signal-to-noise ratio of pairs of images, in decibels.

    >>> import jax.numpy as jnp
    >>> psnr(jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), 0.1)).round(3).tolist()
    [20.0]

    Args:
      a: images in [0, 1].
      b: images in [0, 1].

    Returns:
      At most 100, also for equal images.
    """
    error = jnp.square(a - b).mean(axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error, 10 ** (-_LARGEST_PSNR / 10)))


def ssim(
    a: Float[Array, "batch height width channels"],
    b: Float[Array, "batch height width channels"],
) -> Float[Array, " batch"]:
    """Returns the structural similarity of pairs of images.

    It is computed in a Gaussian window of 11x11 pixels (sigma 1.5) around every pixel
    where the window fits into the image, and averaged over pixels and channels.

    >>> import jax.numpy as jnp
    >>> image = jnp.linspace(0, 1, 256).reshape(1, 16, 16, 1)
    >>> ssim(image, image).tolist()
    [1.0]

    Args:
      a: images in [0, 1] of at least 11x11 pixels.
      b: images in [0, 1] of the same size.

    Returns:
      At most 1.

    Raises:
      ValueError: if the images are smaller than the window.

    References:
      Z. Wang, A. Bovik, H. Sheikh, E. Simoncelli, `Image Quality Assessment: From Error
      Visibility to Structural Similarity <https://doi.org/10.1109/TIP.2003.819861>`_,
      2004
    """
    if min(a.shape[1:3]) < _WINDOW_SIZE:
        raise ValueError(
            f"SSIM needs images of at least {_WINDOW_SIZE}x{_WINDOW_SIZE}, got "
            f"{a.shape[1]}x{a.shape[2]}"
        )
    mean_a, mean_b = _windowed_mean(a), _windowed_mean(b)
    variance_a = _windowed_mean(a * a) - mean_a**2
    variance_b = _windowed_mean(b * b) - mean_b**2
    covariance = _windowed_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _K1**2) / (mean_a**2 + mean_b**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance_a + variance_b + _K2**2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _windowed_mean(x: jax.Array) -> jax.Array:
    """Averages (batch, height, width, channels) in a Gaussian window.

    It sums shifted images: this is exact in float32 on every device, while some devices
    round the inputs of a convolution.
    """
    offsets = np.arange(_WINDOW_SIZE) - _WINDOW_SIZE // 2
    weights = np.exp(-0.5 * (offsets / _WINDOW_SIGMA) ** 2)
    for axis in (1, 2):
        size = x.shape[axis] - _WINDOW_SIZE + 1
        x = sum(
            weight * jax.lax.slice_in_dim(x, start, start + size, axis=axis)
            for start, weight in enumerate((weights / weights.sum()).tolist())
        )
    return x
