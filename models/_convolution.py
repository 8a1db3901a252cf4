"""Convolution and max pooling, in the form that each backend runs fast.

GPUs and TPUs get XLA's own operations. XLA for CPUs is fast on the most common
convolutions, and up to a hundred times slower than need be on others. There the same
numbers are computed in another form, which depends on the shapes alone:

====================  ==================================================
convolution           form on CPUs
====================  ==================================================
1x1                   a matrix product
depthwise             a sum of shifted products
grouped               a convolution for every few groups
few output pixels     a matrix product with the windows of the input
patches, no overlap   the same
3x3, many channels    Winograd's, with fewer multiplications
few outputs           a sum of shifted matrix products
large kernel          a matrix product with the windows of the input,
                      if the output has few pixels
all others            XLA's; if strided, the gradient with respect to a
                      small input of many channels is that of the
                      matrix product
====================  ==================================================

There the gradients of XLA's convolution are convolutions in the layout (batch, height,
width, channels) too. XLA brings others to this layout by itself, but on CPUs it does
not do so inside loops, where they are some fifty times slower
(https://github.com/jax-ml/jax/issues/12868). The gradient with respect to the kernel
reads that of the output once for each input channel, so a large one is divided into
bands of rows, which stay in the cache.

In the other forms, half precision is computed in float32 and rounded once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models import _winograd

Bilinear: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
Form: TypeAlias = Callable[..., jax.Array]  # (x, kernel, window)
Gradients: TypeAlias = Callable[..., tuple[jax.Array, jax.Array]]
Size: TypeAlias = tuple[int, int]

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Output pixels of an image, and of a batch, up to which windows are faster.
_FEW_PIXELS = 4
_FEW_PIXELS_OF_BATCH = 128
# Output pixels of a batch up to which windows are faster with a large kernel, and the
# entries from which a kernel is large.
_SOME_PIXELS_OF_BATCH, _LARGE_KERNEL = 1600, 2**18
# Output pixels of an image up to which they are faster for the gradient with a stride,
# and input channels from which they are.
_FEW_STRIDED_PIXELS = 256
_MANY_STRIDED_CHANNELS = 128
# Entries of an output up to which it stays in the cache of a core: 1 MiB in float32.
_ENTRIES_OF_BAND = 2**18
# Channels in a group from which XLA's convolution is fast.
_FAST_GROUP = 16
# Multiplications and channels from which Winograd's convolution is faster, and channels
# from which it is if its tiles have too many entries for the cache.
_SOME_PRODUCTS, _SOME_CHANNELS = 2**25, 64
_MANY_ENTRIES, _MANY_CHANNELS = 2**24, 128
# Products of an input pixel, relative to its channels, up to which shifting them is
# faster.
_FEW_PRODUCTS = 1.5


class Forms(NamedTuple):
    """Forms of the convolution that are used with and without gradients of their own.

    Attributes:
      common: XLA's, for the most common convolutions.
      depthwise: a sum of shifted products.
      tiles: Winograd's, with fewer multiplications.
    """

    common: Form
    depthwise: Form
    tiles: Form


class Window(NamedTuple):
    """How a convolution moves over its input; pairs are (rows, columns).

    Attributes:
      strides: distance between neighboring windows.
      padding: zeros before and after the rows, and the columns.
      dilation: distance between neighboring entries of a window.
      groups: number of groups of channels.
    """

    strides: Size = (1, 1)
    padding: tuple[Size, Size] = ((0, 0), (0, 0))
    dilation: Size = (1, 1)
    groups: int = 1


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    **others: Any,
) -> jax.Array:
    """Convolves like `jax.lax.conv_general_dilated`, in whose place `nnx.Conv` uses it.

    It has gradients of any order. Forward-mode differentiation works on the gradients,
    as in ``jax.jvp(jax.grad(...))``, but not on the convolution itself.

    Args:
      lhs: images (batch, height, width, inputs).
      rhs: kernels (rows, columns, inputs / feature_group_count, outputs).
      window_strides: distance between neighboring windows.
      padding: zeros before and after the rows, and the columns.
      rhs_dilation: distance between neighboring entries of a window.
      feature_group_count: number of groups of channels.
      others: what else `nnx.Conv` passes; it is the same for all two-dimensional
        convolutions of images in this layout.

    Returns:
      An array (batch, ..., ..., outputs) of the same dtype.
    """
    del others
    (top, bottom), (left, right) = padding
    window = Window(
        strides=(window_strides[0], window_strides[1]),
        padding=((top, bottom), (left, right)),
        dilation=(rhs_dilation[0], rhs_dilation[1]),
        groups=feature_group_count,
    )
    return _convolve(lhs, rhs, window)


def _any_platform(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    native = functools.partial(_native, window=window)
    forms = Forms(_native, _depthwise, _in_tiles)
    form = _form_on_cpu(x, kernel, window, forms)
    return lax.platform_dependent(x, kernel, cpu=form, default=native)


_convolve = jax.custom_vjp(_any_platform, nondiff_argnums=(2,))


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, window: Window
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _any_platform(x, kernel, window), (x, kernel)


def _convolve_backward(
    window: Window, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    native = functools.partial(_native, window=window)
    forms = Forms(
        _with_gradients(_native, _common_gradients),
        _with_gradients(_depthwise, _depthwise_gradients),
        _with_gradients(_in_tiles, _gradients_in_tiles),
    )
    form = _form_on_cpu(*residuals, window, forms)
    return lax.platform_dependent(
        *residuals, dy, cpu=_gradients(form), default=_gradients(native)
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _gradients(form: Bilinear) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def gradients(
        x: jax.Array, kernel: jax.Array, dy: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        dx, dkernel = jax.vjp(form, x, kernel)[1](dy)
        return dx, dkernel

    return gradients


def _native(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=window.groups,
    )


def _form_on_cpu(
    x: jax.Array, kernel: jax.Array, window: Window, forms: Forms
) -> Bilinear:
    """Returns the form of a convolution of such arrays that is fast on CPUs."""
    rows, columns, inputs, outputs = kernel.shape
    is_padded = window.padding != ((0, 0), (0, 0))
    has_no_overlap = window.strides == (rows, columns) and not is_padded
    form: Form
    if window.groups > 1 and inputs == 1 and outputs == window.groups:
        form = forms.depthwise
    elif window.groups > 1:
        form = functools.partial(_grouped, forms=forms)
    elif (rows, columns) == (1, 1) and not is_padded:
        form = _pointwise
    elif has_no_overlap or _has_few_pixels(x, kernel, window):
        form = _windows
    elif _suits_tiles(x, kernel, window):
        form = forms.tiles
    elif window.strides == (1, 1) and _has_few_products(kernel):
        form = _products
    elif _has_large_kernel(x, kernel, window):
        form = _windows
    else:
        return functools.partial(forms.common, window=window)
    return _in_float32(functools.partial(form, window=window))


def _has_few_pixels(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    pixels = _output_pixels(x, kernel, window)
    return pixels <= _FEW_PIXELS or x.shape[0] * pixels <= _FEW_PIXELS_OF_BATCH


def _has_large_kernel(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    pixels = x.shape[0] * _output_pixels(x, kernel, window)
    return kernel.size >= _LARGE_KERNEL and pixels <= _SOME_PIXELS_OF_BATCH


def _has_few_products(kernel: jax.Array) -> bool:
    rows, columns, inputs, outputs = kernel.shape
    return rows * columns * outputs <= _FEW_PRODUCTS * inputs


def _output_pixels(x: jax.Array, kernel: jax.Array, window: Window) -> int:
    return math.prod(_output_size(x, (kernel.shape[0], kernel.shape[1]), window))


def _suits_tiles(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    *size, inputs, outputs = kernel.shape
    if size != [3, 3] or window != Window(padding=window.padding):
        return False
    channels = min(inputs, outputs)
    entries = _winograd.count_entries(x, window.padding)
    if entries * (inputs + outputs) > _MANY_ENTRIES:
        return channels >= _MANY_CHANNELS
    return channels >= _SOME_CHANNELS and entries * inputs * outputs >= _SOME_PRODUCTS


def _in_float32(form: Bilinear) -> Bilinear:
    def rounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return form(x.astype(dtype), kernel.astype(dtype)).astype(x.dtype)

    return rounded


def _output_size(x: jax.Array, size: Size, window: Window) -> Size:
    def length(axis: int) -> int:
        span = window.dilation[axis] * (size[axis] - 1) + 1
        padded = x.shape[1 + axis] + sum(window.padding[axis])
        return (padded - span) // window.strides[axis] + 1

    return length(0), length(1)


def _shifted(x: jax.Array, size: Size, window: Window) -> list[jax.Array]:
    """Returns the input pixels that meet each entry of a kernel, row by row.

    Each array is (batch, output height, output width, inputs).
    """
    height, width = _output_size(x, size, window)
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    (down, right), (row_step, column_step) = window.strides, window.dilation
    return [
        x[:, row : row + down * height : down, column : column + right * width : right]
        for i, j in itertools.product(*map(range, size))
        for row, column in [(i * row_step, j * column_step)]
    ]


def _pointwise(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    x = x[:, :: window.strides[0], :: window.strides[1]]
    y = lax.collapse(x, 0, 3) @ kernel[0, 0]
    return y.reshape(*x.shape[:3], kernel.shape[3])


def _depthwise(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    factors = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    shifted = _shifted(x, (kernel.shape[0], kernel.shape[1]), window)
    products = [factors[i] * part for i, part in enumerate(shifted)]
    return functools.reduce(jnp.add, products)


def _products(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    rows, columns, inputs, outputs = kernel.shape
    factors = kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
    products = (lax.collapse(x, 0, 3) @ factors).reshape(*x.shape[:3], -1)
    shifted = _shifted(products, (rows, columns), window)
    own = [part[..., i * outputs :][..., :outputs] for i, part in enumerate(shifted)]
    return functools.reduce(jnp.add, own)


def _windows(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    rows, columns, inputs, outputs = kernel.shape
    height, width = _output_size(x, (rows, columns), window)
    if window.strides == (rows, columns) and window.padding == ((0, 0), (0, 0)):
        x = x[:, : rows * height, : columns * width]
        x = x.reshape(x.shape[0], height, rows, width, columns, inputs).swapaxes(2, 3)
        x = lax.collapse(x, 3)
    else:
        x = jnp.concatenate(_shifted(x, (rows, columns), window), axis=-1)
    y = lax.collapse(x, 0, 3) @ lax.collapse(kernel, 0, 3)
    return y.reshape(x.shape[0], height, width, outputs)


def _grouped(
    x: jax.Array, kernel: jax.Array, window: Window, forms: Forms
) -> jax.Array:
    """Convolves every few groups by themselves, with zeros between the groups."""
    rows, columns, inputs, outputs = kernel.shape
    together = max(
        n
        for n in range(1, window.groups + 1)
        if window.groups % n == 0 and (n == 1 or n * inputs <= _FAST_GROUP)
    )
    parts = window.groups // together
    shape = (rows, columns, inputs, parts, together, outputs // window.groups)
    own = jnp.eye(together, dtype=kernel.dtype)
    kernel = jnp.einsum("hwipgo,fg->phwfigo", kernel.reshape(shape), own)
    kernel = kernel.reshape(parts, rows, columns, together * inputs, -1)
    window = window._replace(groups=1)
    images = jnp.split(x, parts, axis=-1)
    found = [
        _form_on_cpu(images[i], kernel[i], window, forms)(images[i], kernel[i])
        for i in range(parts)
    ]
    return jnp.concatenate(found, axis=-1)


def _in_tiles(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    return _winograd.convolve(x, kernel, window.padding)


def _gradients_in_tiles(
    x: jax.Array, kernel: jax.Array, window: Window, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (top, bottom), (left, right) = window.padding
    sides = ((2 - top, 2 - bottom), (2 - left, 2 - right))
    dx = _winograd.convolve(dy, kernel, sides, transposed=True)
    return dx, _winograd.kernel_gradient(x, dy, window.padding)


def _with_gradients(form: Form, gradients: Gradients) -> Form:
    """Gives a form of the convolution other gradients than JAX finds."""

    def forward(x: jax.Array, kernel: jax.Array, window: Window) -> Any:
        return form(x, kernel, window), (x, kernel)

    def backward(window: Window, residuals: Any, dy: jax.Array) -> Any:
        return gradients(*residuals, window, dy)

    convolve = jax.custom_vjp(form, nondiff_argnums=(2,))
    convolve.defvjp(forward, backward)
    return convolve


def _depthwise_gradients(
    x: jax.Array, kernel: jax.Array, window: Window, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (dx,) = jax.vjp(lambda x: _depthwise(x, kernel, window), x)[1](dy)
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    _, reach = _lengths(kernel, window, dy)
    rows, columns, _, channels = kernel.shape

    # A loop keeps XLA from writing the shifted images of all entries to memory.
    def add_entry(i: jax.Array, dkernel: jax.Array) -> jax.Array:
        row, column = i // columns, i % columns
        corner = (0, row * window.dilation[0], column * window.dilation[1], 0)
        size = (x.shape[0], reach[0] + 1, reach[1] + 1, channels)
        shifted = lax.dynamic_slice(padded, corner, size)
        shifted = shifted[:, :: window.strides[0], :: window.strides[1]]
        entry = (shifted * dy).sum((0, 1, 2)).reshape(1, 1, 1, channels)
        return lax.dynamic_update_slice(dkernel, entry, (row, column, 0, 0))

    zeros = jnp.zeros_like(kernel)
    return dx, lax.fori_loop(0, rows * columns, add_entry, zeros)


def _common_gradients(
    x: jax.Array, kernel: jax.Array, window: Window, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dx = _input_gradient(x, kernel, window, dy)
    return dx, _kernel_gradient(x, kernel, window, dy)


def _lengths(
    kernel: jax.Array, window: Window, dy: jax.Array
) -> tuple[list[int], list[int]]:
    """Returns two lengths for (rows, columns): of a window, and of the way it moves."""
    axes = range(2)
    span = [window.dilation[i] * (kernel.shape[i] - 1) for i in axes]
    reach = [window.strides[i] * (dy.shape[1 + i] - 1) for i in axes]
    return span, reach


def _input_gradient(
    x: jax.Array, kernel: jax.Array, window: Window, dy: jax.Array
) -> jax.Array:
    is_small = dy.shape[1] * dy.shape[2] <= _FEW_STRIDED_PIXELS
    is_deep = x.shape[-1] >= _MANY_STRIDED_CHANNELS
    if window.strides != (1, 1) and is_small and is_deep:
        form = _in_float32(functools.partial(_windows, window=window))
        return jax.vjp(lambda x: form(x, kernel), x)[1](dy)[0]
    span, reach = _lengths(kernel, window, dy)
    padding = [
        (span[i] - low, x.shape[1 + i] + low - 1 - reach[i])
        for i, (low, _) in enumerate(window.padding)
    ]
    return lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        padding,
        lhs_dilation=window.strides,
        rhs_dilation=window.dilation,
        dimension_numbers=_LAYOUT,
    )


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, window: Window, dy: jax.Array
) -> jax.Array:
    span, reach = _lengths(kernel, window, dy)
    rows, columns = (
        (low, span[i] + reach[i] + 1 - x.shape[1 + i] - low)
        for i, (low, _) in enumerate(window.padding)
    )
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def gradient(x: jax.Array, dy: jax.Array, rows: Size) -> jax.Array:
        # The sum over the batch takes the place of the one over input channels.
        found = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            dy.transpose(1, 2, 0, 3),
            window.dilation,
            (rows, columns),
            rhs_dilation=window.strides,
            dimension_numbers=_LAYOUT,
            preferred_element_type=dtype,
        )
        return found.transpose(1, 2, 0, 3)

    height = _rows_of_band(dy)
    if height == dy.shape[1]:
        return gradient(x, dy, rows).astype(x.dtype)

    bands, step = math.ceil(dy.shape[1] / height), window.strides[0]
    missing = bands * height - dy.shape[1]  # in the last band, which gets zeros
    reach_of_band = span[0] + (height - 1) * step + 1
    x = _pad_rows(x, rows[0], rows[1] + missing * step)
    dy = _pad_rows(dy, 0, missing)

    def add_band(i: jax.Array, total: jax.Array) -> jax.Array:
        first = i * height
        x_band = lax.dynamic_slice_in_dim(x, first * step, reach_of_band, axis=1)
        dy_band = lax.dynamic_slice_in_dim(dy, first, height, axis=1)
        return total + gradient(x_band, dy_band, (0, 0))

    zeros = jnp.zeros(kernel.shape, dtype)
    return lax.fori_loop(0, bands, add_band, zeros).astype(x.dtype)


def _rows_of_band(dy: jax.Array) -> int:
    """Returns the height of the bands in which to add up the kernel gradient."""
    bands = max(1, math.ceil(dy.size / _ENTRIES_OF_BAND))
    return math.ceil(dy.shape[1] / bands)


def _pad_rows(x: jax.Array, before: int, after: int) -> jax.Array:
    """Adds rows of zeros, or removes rows where a number is negative."""
    keep = (0, 0, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), (keep, (before, after, 0), keep, keep))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Returns the maximum over windows, with the same padding on all sides.

    If pixels of a window are equal, the first in row-major order gets the gradient, as
    in PyTorch.

    Args:
      x: images (batch, height, width, channels).
      size: height and width of a window.
      stride: distance between neighboring windows.
      padding: rows and columns around the images that are never the maximum.
    """
    return _native_max_pool(x, size, stride, padding)


def _native_max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    sides = (padding, padding)
    pooled: jax.Array = nnx.max_pool(x, (size, size), (stride, stride), (sides, sides))
    return pooled


def _max_pool_forward(
    x: jax.Array, size: int, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _native_max_pool(x, size, stride, padding)
    return y, (x, y)


def _max_pool_backward(
    size: int,
    stride: int,
    padding: int,
    residuals: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array]:
    def native(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
        pool = functools.partial(
            _native_max_pool, size=size, stride=stride, padding=padding
        )
        return jax.vjp(pool, x)[1](dy)[0]

    def on_cpu(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        window = Window(strides=(stride, stride))
        shifted = functools.partial(_shifted, size=(size, size), window=window)
        padded = jnp.pad(x, sides, constant_values=-jnp.inf)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        is_taken, parts = jnp.zeros(y.shape, bool), []
        for part in shifted(padded):
            is_first = (part == y) & ~is_taken
            is_taken |= is_first
            parts.append(jnp.where(is_first, dy.astype(dtype), 0))
        (dx,) = jax.linear_transpose(shifted, padded.astype(dtype))(parts)
        height, width = x.shape[1:3]
        dx = dx[:, padding : padding + height, padding : padding + width]
        return dx.astype(x.dtype)

    return (lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=native),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
