"""Random Gradient: one random factor per step for the whole gradient."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_tricks._numerics import accumulator_dtype, map_in, scalar_dtype
from optax_tricks._validation import check_in, check_leaves, check_ordered


class ScaleByRandomState(NamedTuple):
    """State of `scale_by_random`.

    Attributes:
      random_key: typed PRNG key of shape (), split once per step.
      random_factor: float of shape (), the factor of the latest update. It is 1 before
        the first update and in steps that are not scaled. It is float32, or float64 if
        a leaf of the parameters is float64 or complex128.
    """

    random_key: jax.Array
    random_factor: jax.Array


def scale_by_random(
    key: ArrayLike,
    *,
    minval: ArrayLike = 0.0,
    maxval: ArrayLike = 1.0,
    probability: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the whole gradient by one random factor per step.

    The updates must still be multiplied by a learning rate. With
    $u_k \sim \mathcal{U}(\text{minval}, \text{maxval})$ drawn once per step,

    $$
    g_k \mapsto u_k \, g_k ,
    $$

    which is the gradient of the loss multiplied by $u_k$. Learning rate and
    weight decay are not scaled if this transform precedes them in the chain.

    Args:
      key: an int of 64 bits or a single PRNG key. To train several seeds under
        `jax.vmap`, build the transform inside the mapped function, with one key for
        each seed.
      minval: the lower limit of the factor, inclusive.
      maxval: the upper limit of the factor, exclusive. Equal limits give a constant.
      probability: the probability, in [0, 1], that a step is scaled. Other steps are
        not changed. The paper's segmentation code uses 0.5.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `ScaleByRandomState`. All
      leaves are multiplied by the same factor and keep their dtype.

    Raises:
      ValueError: if ``key`` is neither such an int nor a key, if ``minval > maxval``,
        if one of them or their difference is not finite in float32, or if
        ``probability`` is outside [0, 1]; on init, if ``key`` is an array of several
        keys; on update, if a leaf is neither floating-point nor complex.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_tricks
      >>> tx = optax.chain(optax_tricks.scale_by_random(0), optax.sgd(0.1))
      >>> params = {"w": jnp.array([2.0, 4.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([1.0, 3.0])}, state, params)
      >>> factor = optax.tree.get(state, "random_factor")
      >>> print(jnp.allclose(updates["w"], -0.1 * factor * jnp.array([1.0, 3.0])))
      True

    References:
      J. Wei, [Fast, Better Training Trick: Random
      Gradient](https://arxiv.org/abs/1808.04293), 2018

    Note:
      The paper proposes a cyclical factor as future work. Use
      ``optax.scale_by_schedule(triangular_schedule(0.0, 1.0, half_period))`` for it.
      A scale-invariant transform after this one (Adam, `perturbed_unit_step`) undoes
      the scaling in part or in full.
    """
    check_ordered("minval", minval, "maxval", maxval)
    check_in("minval", minval, "(-inf, inf)")
    check_in("maxval", maxval, "(-inf, inf)")
    if isinstance(minval, numbers.Real) and isinstance(maxval, numbers.Real):
        check_in("maxval - minval", float(maxval) - float(minval), "[0, inf)")
    check_in("probability", probability, "[0, 1]")
    _check_key(key)

    def init_fn(params: optax.Params) -> ScaleByRandomState:
        return ScaleByRandomState(
            random_key=_own_key(key), random_factor=jnp.ones((), scalar_dtype(params))
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByRandomState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByRandomState]:
        del params, extra_args
        check_leaves("scale_by_random", updates)
        dtype = state.random_factor.dtype
        next_key, factor_key, choice_key = jax.random.split(state.random_key, 3)
        low, high = jnp.asarray(minval, dtype), jnp.asarray(maxval, dtype)
        factor = low + (high - low) * jax.random.uniform(factor_key, (), dtype)
        # Rounding can give maxval itself.
        factor = jnp.minimum(factor, jnp.nextafter(high, low))
        scaled = jax.random.uniform(choice_key, (), jnp.float32) < probability
        factor = jnp.where(scaled, factor, jnp.ones((), dtype))

        wide = accumulator_dtype(updates)
        updates = map_in(wide, lambda g: g * factor.astype(wide), updates)
        return updates, ScaleByRandomState(next_key, factor)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_key(key: ArrayLike) -> None:
    """Raises ValueError unless key is an int, an array of ints or a PRNG key."""
    dtype = getattr(key, "dtype", object)
    is_array = any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jax.dtypes.prng_key)
    )
    if not isinstance(key, numbers.Integral) and not is_array:
        raise ValueError(f"key must be an int or a PRNG key, got {key!r}.")
    if isinstance(key, int) and not -(2**63) <= key < 2**63:
        raise ValueError(f"key must be at least -2**63 and below 2**63, got {key}.")


def _own_key(key: ArrayLike) -> jax.Array:
    """Returns a typed copy of key: donating the state must not delete the caller's."""
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        typed = jnp.copy(key)
    elif jnp.shape(key):  # a legacy key, an array of uint32
        typed = jax.random.wrap_key_data(jnp.copy(key))
    else:
        typed = jax.random.key(key)
    if typed.shape:
        raise ValueError(
            f"key must be a single key, got keys of shape {typed.shape}. Build the "
            "transform inside jax.vmap to give each seed its own key."
        )
    return typed
