"""The layers that all networks are built from."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.typing import DTypeLike

from models._batch_norm import batch_norm
from models._convolution import conv_general_dilated

Norm = Literal["batch", "frozen_batch", "group", "instance", "none"]

lecun_normal = nnx.initializers.lecun_normal()
he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class _KeepsDtype:
    """Makes a normalization of Flax compute in float32 and return the input's dtype.

    With Flax's own `dtype` the running statistics would be rounded to it.
    """

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Maps (..., channels) to the same shape and dtype."""
        # The class of Flax comes next in the order of base classes.
        y: jax.Array = super().__call__(x, *args, **options)  # type: ignore[misc]
        return y.astype(x.dtype)


class _Statistic(nnx.BatchStat[jax.Array]):
    """A running statistic that is assigned as a whole.

    Flax asks for the sharding of a value that is assigned by index. For a traced value
    this raises an error, and jax builds its message from everything traced so far
    (https://github.com/jax-ml/jax/pull/40041). This took most of the time of tracing a
    deep network.
    """

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        if index is ...:
            # Casting float64 explicitly avoids a warning of jax.
            self.set_value(value.astype(self.dtype))
        else:
            super().__setitem__(index, value)


class BatchNorm(_KeepsDtype, nnx.BatchNorm):
    """Batch normalization with PyTorch's momentum of 0.1 and eps of 1e-5.

    The running variance averages variances over n values, as in Flax. PyTorch divides
    by n - 1, so that its batches contribute n / (n - 1) times as much.

    In training it has gradients of any order, and no forward-mode differentiation.
    """

    def __init__(self, channels: int, **options: Any):
        # In Flax, momentum is the weight of the old value.
        super().__init__(channels, momentum=0.9, epsilon=1e-5, **options)
        self.mean = _Statistic(jnp.zeros(channels, jnp.float32))
        self.var = _Statistic(jnp.ones(channels, jnp.float32))

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Maps (..., channels) to the same shape and dtype."""
        if self.use_running_average or args or options:
            return super().__call__(x, *args, **options)
        assert self.scale is not None
        assert self.bias is not None
        y, *statistics = batch_norm(x, self.scale[...], self.bias[...], self.epsilon)
        for running, new in zip((self.mean, self.var), statistics, strict=True):
            new = (1 - self.momentum) * jax.lax.stop_gradient(new)
            running[...] = self.momentum * running[...] + new
        return y


class GroupNorm(_KeepsDtype, nnx.GroupNorm):
    """Group normalization (Wu and He, 2018) with eps of 1e-5.

    The number of groups is the largest, up to 32, that divides the number of channels
    and leaves at least two channels in each group.
    """

    def __init__(self, channels: int, **options: Any):
        groups = max(
            n
            for n in range(1, 33)
            if channels % n == 0 and (n == 1 or channels >= 2 * n)
        )
        super().__init__(channels, num_groups=groups, epsilon=1e-5, **options)


class InstanceNorm(_KeepsDtype, nnx.InstanceNorm):
    """Instance normalization without parameters, as in pix2pix, with eps of 1e-5.

    Raises:
      ValueError: if it is called with a single pixel, which it would turn into zero.
    """

    def __init__(self, channels: int, **options: Any):
        super().__init__(
            channels, epsilon=1e-5, use_scale=False, use_bias=False, **options
        )

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Maps (batch, height, width, channels) to the same shape and dtype."""
        if math.prod(x.shape[1:-1]) == 1:
            raise ValueError(
                "instance normalization of a single pixel is zero: use larger images "
                "or another norm"
            )
        return super().__call__(x, *args, **options)


class LayerNorm(_KeepsDtype, nnx.LayerNorm):
    """Layer normalization with eps of 1e-6."""


class FrozenBatchNorm(nnx.Module):
    """Batch normalization with constant statistics, scale and bias.

    It is for fine-tuning from pretrained weights. None of its variables is an
    `nnx.Param`, so optimizers, weight decay and parameter counts leave them out.
    """

    def __init__(self, channels: int, *, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.BatchStat(jnp.ones(channels, param_dtype))
        self.bias = nnx.BatchStat(jnp.zeros(channels, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., channels) to the same shape and dtype."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * factor
        factor, shift = (
            jnp.broadcast_to(jax.lax.stop_gradient(v), x.shape) for v in (factor, shift)
        )
        return (factor * x + shift).astype(x.dtype)


class UpConv(nnx.ConvTranspose):
    """A transposed convolution of stride 2, computed as a convolution of stride 1.

    It doubles height and width: each input pixel gives two by two output pixels at
    once. The result is that of `nnx.ConvTranspose` with kernels of size 2 or 4, whose
    gradient in XLA is about twenty times slower on CPUs.

    Raises:
      ValueError: if kernel_size is neither 2 nor 4.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, **options: Any):
        if kernel_size not in (2, 4):
            raise ValueError(f"kernel_size must be 2 or 4, got {kernel_size}")
        super().__init__(
            inputs, outputs, (kernel_size, kernel_size), strides=2, **options
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, 2 height, ..., outputs)."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], bias), dtype=self.dtype
        )
        # The number of input rows, and of columns, that an output pixel depends on.
        taps = kernel.shape[0] // 2
        if taps == 1:
            kernel = kernel[::-1, ::-1]
        inputs, outputs = kernel.shape[2:]
        kernel = kernel.reshape(taps, 2, taps, 2, inputs, outputs)
        kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, inputs, -1)
        pad = taps - 1
        # Padding inside the convolution would make its gradient slow again.
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        y = conv_general_dilated(padded, kernel, (1, 1), ((0, 0), (0, 0)))
        batch, height, width = x.shape[:3]
        y = y.reshape(*y.shape[:3], 2, 2, outputs)
        # The two output rows (a) of an input row see windows that start one row apart;
        # the same holds for columns (b).
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
    """Takes the place of a normalization in networks without one."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns its input."""
        return x


Normalization = BatchNorm | FrozenBatchNorm | GroupNorm | InstanceNorm | Identity


def standardize(kernel: jax.Array) -> jax.Array:
    """Standardizes a kernel to mean 0 and variance 1 for every output channel.

    Args:
      kernel: (..., inputs, outputs).

    Returns:
      An array of the same shape and dtype.

    References:
      S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, `Micro-Batch Training with
      Batch-Channel Normalization and Weight Standardization
      <https://arxiv.org/abs/1903.10520>`_, 2019
    """
    axes = tuple(range(kernel.ndim - 1))
    mean = kernel.mean(axes, keepdims=True)
    variance = kernel.var(axes, keepdims=True)
    return (kernel - mean) * jax.lax.rsqrt(variance + 1e-5)


def _standardize_and_promote(
    arrays: tuple[jax.Array, jax.Array, jax.Array | None], *, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    inputs, kernel, bias = arrays
    return dtypes.promote_dtype((inputs, standardize(kernel), bias), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Creates the layers of one network.

    Attributes:
      rngs: the source of keys for parameters and dropout.
      norm: the normalization that follows a convolution. "frozen_batch" is batch
        normalization with constant statistics, scale and bias. "instance" has no
        parameters. With "instance" and "none" convolutions have a bias.
      weight_standardization: whether convolutions use standardized kernels.
      dtype: dtype of the computation, such as `jnp.bfloat16`. None promotes inputs and
        parameters to a common dtype. Normalization and the last layer use at least
        float32.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: if there is no such norm.
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
        """Returns a convolution with the same zero padding on all sides.

        With `use_bias=None` it has a bias if the normalization brings none.
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
            conv_general_dilated=conv_general_dilated,
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
        """Returns a transposed convolution, which doubles height and width."""
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
        """Whether the normalization has no bias."""
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
    ) -> Normalization:
        """Returns the normalization of `channels`."""
        if self.norm == "none":
            return Identity()
        if self.norm == "frozen_batch":
            return FrozenBatchNorm(channels, param_dtype=self.param_dtype)
        kinds: dict[str, Callable[..., BatchNorm | GroupNorm | InstanceNorm]] = {
            "batch": BatchNorm,
            "group": GroupNorm,
            "instance": InstanceNorm,
        }
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
        """Returns the last layer of a classifier, which uses at least float32."""
        return self.precise().linear(inputs, outputs, kernel_init=kernel_init)

    def precise(self) -> "Layers":
        """Returns layers for the end of a network.

        They use at least float32 and no weight standardization.
        """
        dtype = self.dtype and jnp.promote_types(self.dtype, jnp.float32)
        return dataclasses.replace(self, dtype=dtype, weight_standardization=False)

    def linear(self, inputs: int, outputs: int, **options: Any) -> nnx.Linear:
        """Returns a linear layer inside a network."""
        return nnx.Linear(
            inputs,
            outputs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
            **options,
        )


class ConvNorm(nnx.List[nnx.Conv | Normalization]):
    """A convolution, its normalization and an activation.

    Args:
      conv: the convolution.
      layers: creates the normalization.
      activation: the activation; None for none.
    """

    def __init__(
        self,
        conv: nnx.Conv,
        *,
        layers: Layers,
        activation: Callable[[jax.Array], jax.Array] | None = nnx.relu,
    ):
        super().__init__([conv, layers.normalize(conv.out_features)])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        conv, norm = self
        x = norm(conv(x))
        return x if self.activation is None else self.activation(x)


class DoubleConv(nnx.Dict[nnx.Conv | Normalization]):
    """Two 3x3 convolutions, each with its normalization and a ReLU.

    Args:
      inputs: channels of the input.
      width: channels between the convolutions.
      outputs: channels of the output.
      layers: creates the layers.
    """

    def __init__(self, inputs: int, width: int, outputs: int, *, layers: Layers):
        # The keys count the ReLUs too, as in PyTorch's `Sequential`.
        super().__init__(
            {
                "0": layers.conv(inputs, width),
                "1": layers.normalize(width),
                "3": layers.conv(width, outputs),
                "4": layers.normalize(outputs),
            }
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, height, width, outputs)."""
        x = nnx.relu(self["1"](self["0"](x)))
        return nnx.relu(self["4"](self["3"](x)))


def apply(
    block: Callable[[jax.Array], jax.Array], x: jax.Array, *, remat: bool
) -> jax.Array:
    """Applies a block to `x`.

    With `remat`, gradients recompute the activations inside the block: this takes less
    memory and more time.
    """
    if remat:
        y: jax.Array = nnx.remat(lambda block, x: block(x))(block, x)
        return y
    return block(x)


def stored(x: jax.Array) -> jax.Array:
    """Returns x, and has XLA for CPUs write it to memory.

    Otherwise, XLA computes the sum of all residual branches so far anew for each one,
    which takes most of the time of a deep network. jaxlib 0.10 does so all the same, as
    it drops the barrier before it fuses operations.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def average_pool(x: jax.Array) -> jax.Array:
    """Returns the mean over disjoint windows of two by two pixels."""
    y: jax.Array = nnx.avg_pool(x, (2, 2), (2, 2))
    return y


def pooling_matrix(size: int, bins: int) -> jax.Array:
    """Returns weights (bins, size) that average `size` entries into `bins` bins.

    If `bins` does not divide `size`, neighboring bins overlap by an entry, as in
    PyTorch's adaptive pooling.
    """
    rows = []
    for i in range(bins):
        start, end = i * size // bins, math.ceil((i + 1) * size / bins)
        row = [1.0 / (end - start) if start <= j < end else 0.0 for j in range(size)]
        rows.append(row)
    return jnp.array(rows)


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """Averages (batch, height, width, channels) to (batch, bins, bins, channels)."""
    rows = pooling_matrix(x.shape[1], bins).astype(x.dtype)
    columns = pooling_matrix(x.shape[2], bins).astype(x.dtype)
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes (batch, ..., ..., channels) bilinearly to (batch, height, width, ...).

    The centers of pixels lie at halves, as in PyTorch with `align_corners=False`.
    """
    shape = (x.shape[0], height, width, x.shape[3])
    y: jax.Array = jax.image.resize(x, shape, "bilinear", antialias=False)
    return y


class ImageShapeError(ValueError):
    """Images have a shape that the network does not take."""


def check_images(
    images: jax.Array,
    channels: int,
    *,
    at_least: int = 1,
    multiple: int = 1,
    exactly: int | None = None,
) -> None:
    """Raises an error if a network does not take images of this shape.

    Args:
      images: should be (batch, height, width, channels).
      channels: the number of channels that the network takes.
      at_least: the smallest height and width.
      multiple: the number that height and width must be multiples of.
      exactly: the only height and width that the network takes, if there is only one.

    Raises:
      ImageShapeError: if the images do not fit; the message says which would.
    """
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ImageShapeError(
            f"images must be (batch, height, width, {channels}), got "
            f"{images.shape}; for other channels create the network with in_channels"
        )
    height, width = images.shape[1:3]
    if min(height, width) < at_least:
        raise ImageShapeError(
            f"images must be at least {at_least}x{at_least}, got {height}x{width}"
        )
    if exactly is not None and (height, width) != (exactly, exactly):
        raise ImageShapeError(
            f"images must be {exactly}x{exactly}, got {height}x{width}; for another "
            "size create the network with image_size"
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
