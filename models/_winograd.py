"""Convolution with 3x3 kernels in fewer multiplications.

F(2x2, 3x3) of Lavin and Gray (https://arxiv.org/abs/1509.09308): two by two pixels of
the output are computed together, from a tile of four by four pixels of the input. Tiles
and kernel are transformed by sums and differences. Each of the 16 entries of a tile is
then multiplied with its entry of the kernel, as a matrix product over the channels, and
another transform makes the output. So a pixel takes 4 multiplications in place of 9.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Grid: TypeAlias = Sequence[Sequence[jax.Array]]  # an array for each row and column
Padding: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
Transform: TypeAlias = Callable[..., tuple[jax.Array, ...]]

# Entries of all transformed tiles up to which they are computed at once, and those of a
# band of rows if there are more: 32 and 16 MiB in float32.
_ENTRIES_AT_ONCE = 2**23
_ENTRIES_OF_BAND = 2**22
# Where the entries of a transformed kernel are if the kernel is turned by 180 degrees.
_TURNED = (3, 1, 2, 0)


def convolve(
    x: jax.Array, kernel: jax.Array, padding: Padding, *, transposed: bool = False
) -> jax.Array:
    """Convolves images with a 3x3 kernel and stride 1.

    Args:
      x: images (batch, height, width, inputs).
      kernel: an array (3, 3, inputs, outputs).
      padding: zeros before and after the rows, and the columns; rows or columns are
        removed where it is negative.
      transposed: whether to turn the kernel by 180 degrees and exchange its inputs and
        outputs, as the gradient with respect to the input does.

    Returns:
      An array (batch, ..., ..., outputs).
    """
    outputs = kernel.shape[2 if transposed else 3]
    height, width = _output_size(x, padding)
    x, band, bands = _in_bands(x, padding, outputs)
    factors = _twice(_transform_kernel, [list(row) for row in kernel])
    if transposed:
        factors = [[factors[i][j] for j in _TURNED] for i in _TURNED]
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    multiply = functools.partial(lax.dot_general, dimension_numbers=dimensions)

    def convolve_band(x: jax.Array) -> jax.Array:
        parts = _twice(_transform_output, _each(multiply, _tiles(x), factors))
        down, across = x.shape[1] // 2 - 1, x.shape[2] // 2 - 1  # tiles
        shape = (x.shape[0], down, across, outputs)
        # Puts the pixels of each tile side by side.
        pairs = [jnp.stack([p.reshape(shape) for p in row], axis=3) for row in parts]
        y = jnp.stack(pairs, axis=2)
        return y.reshape(x.shape[0], 2 * down, 2 * across, outputs)

    def write_band(i: jax.Array, y: jax.Array) -> jax.Array:
        found = convolve_band(lax.dynamic_slice_in_dim(x, i * band, band + 2, axis=1))
        return lax.dynamic_update_slice_in_dim(y, found, i * band, axis=1)

    if bands == 1:
        y = convolve_band(x)
    else:
        y = jnp.zeros((x.shape[0], bands * band, x.shape[2] - 2, outputs), x.dtype)
        y = lax.fori_loop(0, bands, write_band, y)
    return y[:, :height, :width]


def kernel_gradient(x: jax.Array, dy: jax.Array, padding: Padding) -> jax.Array:
    """Returns the gradient of `convolve` with respect to the kernel.

    Args:
      x: images (batch, height, width, inputs).
      dy: the gradient with respect to the output.
      padding: zeros before and after the rows, and the columns.

    Returns:
      An array (3, 3, inputs, outputs).
    """
    height, width = dy.shape[1:3]
    x, band, bands = _in_bands(x, padding, dy.shape[3])
    missing = ((0, bands * band - height), (0, x.shape[2] - 2 - width))
    dy = jnp.pad(dy, ((0, 0), *missing, (0, 0)))

    def of_factors(x: jax.Array, dy: jax.Array) -> Grid:
        pixels = [[_flat(dy[:, i::2, j::2]) for j in range(2)] for i in range(2)]
        spread = _twice(_transpose_output, pixels)
        return _each(lambda tile, part: tile.T @ part, _tiles(x), spread)

    def add_band(i: jax.Array, total: Grid) -> Grid:
        found = of_factors(
            lax.dynamic_slice_in_dim(x, i * band, band + 2, axis=1),
            lax.dynamic_slice_in_dim(dy, i * band, band, axis=1),
        )
        return _each(jnp.add, total, found)

    if bands == 1:
        total = of_factors(x, dy)
    else:
        zeros = jnp.zeros((x.shape[3], dy.shape[3]), x.dtype)
        total = lax.fori_loop(0, bands, add_band, [[zeros] * 4] * 4)
    return jnp.stack([jnp.stack(row) for row in _twice(_transpose_kernel, total)])


def count_entries(x: jax.Array, padding: Padding) -> int:
    """Returns the number of entries of all tiles of the input, in each channel."""
    height, width = _output_size(x, padding)
    return 16 * x.shape[0] * math.ceil(height / 2) * math.ceil(width / 2)


def _output_size(x: jax.Array, padding: Padding) -> tuple[int, int]:
    return x.shape[1] + sum(padding[0]) - 2, x.shape[2] + sum(padding[1]) - 2


def _in_bands(
    x: jax.Array, padding: Padding, outputs: int
) -> tuple[jax.Array, int, int]:
    """Pads images to whole tiles, and says how many rows to compute at a time.

    Returns:
      The images, the rows of the output in a band, and the number of bands.
    """
    height, width = _output_size(x, padding)
    entries = count_entries(x, padding) * (x.shape[3] + outputs)
    bands = 1
    if entries > _ENTRIES_AT_ONCE:
        bands = math.ceil(entries / _ENTRIES_OF_BAND)
    band = 2 * math.ceil(height / 2 / bands)
    bands = math.ceil(height / band)
    missing = (bands * band - height, width % 2)
    sides = [(low, high + missing[i], 0) for i, (low, high) in enumerate(padding)]
    keep = (0, 0, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), (keep, *sides, keep)), band, bands


def _tiles(x: jax.Array) -> Grid:
    """Returns each entry of the transformed tiles: 4x4 arrays (tiles, channels)."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    pixels = [
        [_flat(x[:, i : i + height : 2, j : j + width : 2]) for j in range(4)]
        for i in range(4)
    ]
    return _twice(_transform_input, pixels)


def _flat(x: jax.Array) -> jax.Array:
    return lax.collapse(x, 0, 3)


def _each(function: Callable[..., jax.Array], a: Grid, b: Grid) -> Grid:
    return [list(map(function, *rows)) for rows in zip(a, b, strict=True)]


def _twice(transform: Transform, grid: Grid) -> Grid:
    """Transforms along the rows, and along the columns."""
    rows = [transform(*row) for row in grid]
    columns = [transform(*column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


# The matrices of the paper in one dimension, and their transposes.


def _transform_input(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    return a - c, b + c, c - b, b - d


def _transform_kernel(
    a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, ...]:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _transform_output(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    return a + b + c, b - c - d


def _transpose_kernel(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _transpose_output(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    return a, a + b, a - b, -b
