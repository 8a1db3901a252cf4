"""A triangular schedule between two bounds."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_tricks._validation import check_in, check_ordered


def triangular_schedule(
    low: ArrayLike, high: ArrayLike, half_period: ArrayLike
) -> optax.Schedule:
    r"""Rises linearly from `low` to `high`, falls back, and repeats.

    With $p = (k \bmod 2h) / h$ for the step count $k$ and the half period
    $h$, the value is $\text{low} + (\text{high} - \text{low})
    (1 - |1 - p|)$.

    Args:
      low: value at count 0 and at every multiple of twice the half period.
      high: value at odd multiples of the half period.
      half_period: number of steps from `low` to `high`, above 0 and at most 1e9. It
        need not be whole.

    Returns:
      An `optax.Schedule`: a function from step counts (int, any shape) to floats of the
      same shape.

    Raises:
      ValueError: if ``low > high``, if one of them is not finite in float32, or if
        ``half_period`` is out of its range.

    Examples:
      >>> import optax_tricks
      >>> schedule = optax_tricks.triangular_schedule(0.1, 0.5, half_period=2)
      >>> print([round(float(schedule(count)), 3) for count in range(6)])
      [0.1, 0.3, 0.5, 0.3, 0.1, 0.3]

      The cyclical form of Random Gradient:

      >>> import optax
      >>> wave = optax_tricks.triangular_schedule(0.0, 1.0, half_period=100)
      >>> tx = optax.chain(optax.scale_by_schedule(wave), optax.sgd(0.1))

    References:
      L. N. Smith, [Cyclical Learning Rates for Training Neural
      Networks](https://arxiv.org/abs/1506.01186), 2015
    """
    check_ordered("low", low, "high", high)
    check_in("low", low, "(-inf, inf)")
    check_in("high", high, "(-inf, inf)")
    check_in("half_period", half_period, "(0, 1e9]")

    def schedule(count: ArrayLike) -> jax.Array:
        # Take the modulus first, in the given dtype, so that integer counts are exact.
        remainder = jnp.mod(jnp.asarray(count), 2 * half_period)
        phase = remainder.astype(jnp.result_type(float)) / half_period
        rise = 1 - jnp.abs(1 - phase)
        return jnp.asarray(low * (1 - rise) + high * rise)

    return schedule
