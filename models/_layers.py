"""The layers that all networks are made of, in the form their options ask for."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike

Norm = Literal["batch", "frozen_batch", "group", "instance", "none"]

lecun_normal = nnx.initializers.lecun_normal()
he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class _KeepsDtype:
    """Normalises in float32 and returns the input's dtype.

    Flax would round the running statistics to the dtype of the computation.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


class _Statistic(nnx.BatchStat):
    """A running statistic that is set as a whole.

    Flax looks at the sharding of what is assigned by index. For a traced value that
    is an error whose message jax makes from everything traced before
    (https://github.com/jax-ml/jax/pull/40041): tracing a deep network took most of its
    time for that.
    """

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        if index is ...:
            # Computations in float64 end in it here, and not as a warning of jax.
            self.set_value(value.astype(self.dtype))
        else:
            super().__setitem__(index, value)


class BatchNorm(_KeepsDtype, nnx.BatchNorm):
    """Batch normalisation with PyTorch's momentum of 0.1 and eps of 1e-5.

    The running variance is that of the batch over n values, as Flax has it; PyTorch
    divides by n - 1, so its own is larger by n / (n - 1).
    """

    def __init__(self, channels: int, **options):
        # Flax's momentum is the weight of the old value.
        super().__init__(channels, momentum=0.9, epsilon=1e-5, **options)
        self.mean = _Statistic(jnp.zeros(channels, jnp.float32))
        self.var = _Statistic(jnp.ones(channels, jnp.float32))


class GroupNorm(_KeepsDtype, nnx.GroupNorm):
    """Group normalisation (Wu and He, 2018) with eps of 1e-5.

    It has the most groups, up to 32, that divide the channels and hold at least two.
    """

    def __init__(self, channels: int, **options):
        groups = max(
            n
            for n in range(1, 33)
            if channels % n == 0 and (n == 1 or channels >= 2 * n)
        )
        super().__init__(channels, num_groups=groups, epsilon=1e-5, **options)


class InstanceNorm(_KeepsDtype, nnx.InstanceNorm):
    """Instance normalisation without parameters, as in pix2pix, with eps of 1e-5.

    Raises:
      ValueError: when called with a single pixel, which it would turn into zero.
    """

    def __init__(self, channels: int, **options):
        super().__init__(
            channels, epsilon=1e-5, use_scale=False, use_bias=False, **options
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to the same."""
        if math.prod(x.shape[1:-1]) == 1:
            raise ValueError(
                "instance normalisation of a single pixel is zero: use larger images "
                "or another norm"
            )
        return super().__call__(x)


class LayerNorm(_KeepsDtype, nnx.LayerNorm):
    """Layer normalisation with eps of 1e-6."""


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation whose statistics, scale and bias are all constants.

    For fine-tuning from pretrained weights. None of its variables is an `nnx.Param`,
    so that optimizers, weight decay and parameter counts leave them out.
    """

    def __init__(self, channels: int, *, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.BatchStat(jnp.ones(channels, param_dtype))
        self.bias = nnx.BatchStat(jnp.zeros(channels, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., channels) to the same."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * factor
        factor, shift = (
            jnp.broadcast_to(jax.lax.stop_gradient(v), x.shape) for v in (factor, shift)
        )
        return (factor * x + shift).astype(x.dtype)


class UpConv(nnx.ConvTranspose):
    """A transposed convolution that doubles height and width, as one of stride 1.

    Each place of the input gives two by two pixels of the output at once. The numbers
    are those of `nnx.ConvTranspose` with kernels of size 2 or 4; but XLA's gradient of
    that is some twenty times slower on CPUs than this one.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, **options):
        if kernel_size not in (2, 4):
            raise ValueError(f"kernel_size must be 2 or 4, got {kernel_size}")
        super().__init__(
            inputs, outputs, (kernel_size, kernel_size), strides=2, **options
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, 2 height, ..., outputs)."""
        bias = self.bias[...] if self.use_bias else None
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], bias), dtype=self.dtype
        )
        taps = kernel.shape[0] // 2  # places of the input that a pixel comes from
        if taps == 1:
            kernel = kernel[::-1, ::-1]
        inputs, outputs = kernel.shape[2:]
        kernel = kernel.reshape(taps, 2, taps, 2, inputs, outputs)
        kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, inputs, -1)
        pad = taps - 1
        # Padding by the convolution itself would make its gradient slow again.
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        y = jax.lax.conv_general_dilated(
            padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        batch, height, width = x.shape[:3]
        y = y.reshape(*y.shape[:3], 2, 2, outputs)
        # A pixel lies before or behind the centre of its place, by which the places
        # that it comes from move on.
        rows = [
            [
                y[:, pad * a : pad * a + height, pad * b : pad * b + width, a, b]
                for b in (0, 1)
            ]
            for a in (0, 1)
        ]
        y = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
        y = y.reshape(batch, 2 * height, 2 * width, outputs)
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


class Identity(nnx.Module):
    """What stands where a network goes without a normalisation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns its input."""
        return x


def standardize(kernel: jax.Array) -> jax.Array:
    """Weight Standardization: each output channel's kernel to mean 0 and variance 1.

    Args:
      kernel: (..., inputs, outputs).

    References:
      S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, `Micro-Batch Training with
      Batch-Channel Normalization and Weight Standardization
      <https://arxiv.org/abs/1903.10520>`_, 2019
    """
    axes = tuple(range(kernel.ndim - 1))
    mean = kernel.mean(axes, keepdims=True)
    variance = kernel.var(axes, keepdims=True)
    return (kernel - mean) * jax.lax.rsqrt(variance + 1e-5)


def _standardize_and_promote(arrays, *, dtype):
    inputs, kernel, bias = arrays
    return dtypes.promote_dtype((inputs, standardize(kernel), bias), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Makes the layers of one network.

    Attributes:
      rngs: where the keys of parameters and dropout come from.
      norm: what follows a convolution. "frozen_batch" is batch normalisation with
        constant statistics, scale and bias; "instance" has no parameters. With
        "instance" and "none" convolutions have a bias.
      weight_standardization: whether convolutions use standardized kernels.
      dtype: of the computation, such as `jnp.bfloat16`; None for that of inputs and
        parameters together. Normalisation and the last layer are in float32 at
        least.
      param_dtype: of the parameters.
    """

    rngs: nnx.Rngs
    norm: Norm = "batch"
    weight_standardization: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            known = ", ".join(get_args(Norm))
            raise ValueError(f"norm must be one of {known}; got {self.norm!r}")

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool | None = None,
        kernel_init: nnx.Initializer = he_fan_out,
    ) -> nnx.Conv:
        """A convolution padded by zeros on all sides alike, also under a stride.

        It has a bias where it is asked for, or where no normalisation brings one.
        """
        return nnx.Conv(
            inputs,
            outputs,
            (kernel_size, kernel_size),
            strides=stride,
            padding=dilation * ((kernel_size - 1) // 2),
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=self.needs_bias if use_bias is None else use_bias,
            kernel_init=kernel_init,
            promote_dtype=self._promote,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def conv_transpose(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        use_bias: bool | None = None,
        kernel_init: nnx.Initializer = he_fan_out,
    ) -> UpConv:
        """A transposed convolution of stride 2, which doubles height and width."""
        return UpConv(
            inputs,
            outputs,
            kernel_size,
            use_bias=self.needs_bias if use_bias is None else use_bias,
            kernel_init=kernel_init,
            promote_dtype=self._promote,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    @property
    def needs_bias(self) -> bool:
        """Whether the normalisation leaves out a bias."""
        return self.norm in ("instance", "none")

    @property
    def _promote(self) -> Callable[..., Any]:
        standardized = self.weight_standardization
        return _standardize_and_promote if standardized else dtypes.promote_dtype

    def normalize(
        self,
        channels: int,
        *,
        scale_init: nnx.Initializer = nnx.initializers.ones,
    ) -> nnx.Module:
        """The normalisation of `channels`."""
        if self.norm == "none":
            return Identity()
        if self.norm == "frozen_batch":
            return FrozenBatchNorm(channels, param_dtype=self.param_dtype)
        kinds = {"batch": BatchNorm, "group": GroupNorm, "instance": InstanceNorm}
        return kinds[self.norm](
            channels,
            scale_init=scale_init,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def head(
        self,
        inputs: int,
        outputs: int,
        kernel_init: nnx.Initializer = lecun_normal,
    ) -> nnx.Linear:
        """The last layer of a classifier, in float32 at least."""
        return self.precise().linear(inputs, outputs, kernel_init=kernel_init)

    def precise(self) -> "Layers":
        """For a last layer: float32 at least, and kernels as they are."""
        dtype = self.dtype and jnp.promote_types(self.dtype, jnp.float32)
        return dataclasses.replace(self, dtype=dtype, weight_standardization=False)

    def linear(self, inputs: int, outputs: int, **options) -> nnx.Linear:
        """A linear layer inside a network."""
        return nnx.Linear(
            inputs,
            outputs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
            **options,
        )


def apply(block: nnx.Module, x: jax.Array, *, remat: bool) -> jax.Array:
    """Applies a block; with remat its activations are computed again for gradients."""
    if remat:
        return nnx.remat(lambda block, x: block(x))(block, x)
    return block(x)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over windows, padded on all sides alike."""
    return nnx.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)


def average_pool(x: jax.Array) -> jax.Array:
    """Mean over disjoint windows of two by two pixels."""
    return nnx.avg_pool(x, (2, 2), (2, 2))


def pooling_matrix(size: int, bins: int) -> jax.Array:
    """Weights (bins, size) that average `size` entries into `bins` of even width.

    Bins of a size that they do not divide overlap by an entry, as in PyTorch's
    adaptive pooling.
    """
    rows = []
    for i in range(bins):
        start, end = i * size // bins, math.ceil((i + 1) * size / bins)
        row = [1.0 / (end - start) if start <= j < end else 0.0 for j in range(size)]
        rows.append(row)
    return jnp.array(rows)


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """Averages (batch, height, width, channels) into (batch, bins, bins, channels)."""
    rows = pooling_matrix(x.shape[1], bins).astype(x.dtype)
    columns = pooling_matrix(x.shape[2], bins).astype(x.dtype)
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear resizing of (batch, ..., ..., channels), corners of pixels aligned."""
    shape = (x.shape[0], height, width, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


class ImageShapeError(ValueError):
    """Images have a shape that a network cannot take."""


def check_images(
    images: jax.Array,
    channels: int,
    *,
    at_least: int = 1,
    multiple: int = 1,
    exactly: int | None = None,
) -> None:
    """Refuses images that a network cannot take.

    Args:
      images: should be (batch, height, width, channels).
      channels: that the network takes.
      at_least: the smallest height and width.
      multiple: what height and width are divided by in the network.
      exactly: the only height and width, if there is only one.

    Raises:
      ImageShapeError: if they do not fit; the message says what would.
    """
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ImageShapeError(
            f"images must be (batch, height, width, {channels}), got "
            f"{images.shape}; a network for other channels is made with in_channels"
        )
    height, width = images.shape[1:3]
    if min(height, width) < at_least:
        raise ImageShapeError(
            f"images must be at least {at_least}x{at_least}, got {height}x{width}"
        )
    if exactly is not None and (height, width) != (exactly, exactly):
        raise ImageShapeError(
            f"images must be {exactly}x{exactly}, got {height}x{width}; a network for "
            "another size is made with image_size"
        )
    if height % multiple or width % multiple:
        down, up = (
            "x".join(
                str(multiple * max(1, f(side / multiple))) for side in (height, width)
            )
            for f in (math.floor, math.ceil)
        )
        raise ImageShapeError(
            f"height and width of images must be multiples of {multiple}, got "
            f"{height}x{width}; crop or pad them, to {down} or {up} for example"
        )
