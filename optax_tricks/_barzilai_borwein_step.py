"""Step-Tuned SGD: a step size from the change between two gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_tricks._numerics import (
    accumulator_dtype,
    count_if,
    keep_if,
    map_in,
    mergeable,
    scalar_dtype,
    sums_over,
)
from optax_tricks._second_gradient import (
    GradFn,
    check_call,
    check_whole_real_tree,
    evaluate,
)
from optax_tricks._validation import check_in, check_ordered

_NAME = "barzilai_borwein_step"


class BarzilaiBorweinStepState(NamedTuple):
    """State of `barzilai_borwein_step`.

    Floats are float32, or float64 if a leaf of the parameters is float64.

    Attributes:
      bb_count: int32 of shape (), the number of updates so far, k.
      bb_step_size: float of shape (), the factor of the next update. It starts at 1.
      bb_curvature: float of shape (), the inner product of the averaged gradient
        difference and the half step in the latest update. It starts at 0.
      bb_gradient_norm: float of shape (), the norm of the latest g(w).
      bb_half_gradient_norm: float of shape (), the norm of the latest g(w_half).
      bb_nonpositive_curvature_count: int32 of shape (), the number of updates so far
        in which the curvature was not positive, so that `nu` was used.
      bb_min_scale_count: int32 of shape (), the number of updates so far in which the
        factor was raised to `min_scale`.
      bb_max_scale_count: int32 of shape (), the number of updates so far in which the
        factor was lowered to `max_scale`.
      bb_difference: the moving average of gradient differences, a tree with the
        structure and shapes of the parameters, in at least float32.
    """

    bb_count: jax.Array
    bb_step_size: jax.Array
    bb_curvature: jax.Array
    bb_gradient_norm: jax.Array
    bb_half_gradient_norm: jax.Array
    bb_nonpositive_curvature_count: jax.Array
    bb_min_scale_count: jax.Array
    bb_max_scale_count: jax.Array
    bb_difference: optax.Updates


def barzilai_borwein_step(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: ArrayLike = 0.9,
    nu: ArrayLike = 2.0,
    min_scale: ArrayLike = 0.5,
    max_scale: ArrayLike = 2.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds two gradients of a mini-batch and scales the sum by observed curvature.

    The updates must still be multiplied by the learning rate that is given here. With
    $a_k$ the learning rate of step k and $\gamma_0 = 1$,

    $$
    \begin{split}
    w_{1/2} &= w_k - a_k \gamma_k \, g(w_k), \quad
    \Delta w = w_{1/2} - w_k, \quad \Delta g = g(w_{1/2}) - g(w_k) \\
    G_k &= \beta G_{k-1} + (1 - \beta) \Delta g, \quad
    \hat G_k = G_k / (1 - \beta^{k+1}) \\
    \gamma_{k+1} &= \|\Delta w\|^2 / \langle \hat G_k, \Delta w \rangle
    \text{ if } \langle \hat G_k, \Delta w \rangle > 0 \text{, else } \nu,
    \end{split}
    $$

    with $\gamma_{k+1}$ clipped to [min_scale, max_scale]. The update is
    $\gamma_k (g(w_k) + g(w_{1/2}))$, which makes both half steps at once.
    `step_tuned_sgd` is the published algorithm, which is built from this transform.

    Args:
      learning_rate: a number or a schedule, at least 0. It sets the half step, and must
        be the learning rate that follows in the chain.
      beta: the decay of the averaged gradient differences, in [0, 1).
      nu: the factor, before clipping, if the curvature is not positive; above 0.
      min_scale: the smallest factor, above 0.
      max_scale: the largest factor, at least ``min_scale``.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `BarzilaiBorweinStepState`.
      Its ``update`` takes the keyword ``grad_fn(params, step) -> gradients``, as
      `optax.contrib.sam` does, and calls it once, with step 0. ``grad_fn`` must use the
      mini-batch of the incoming gradient. Leaves keep their dtype.

    Raises:
      ValueError: if a setting is no number in its range, also after rounding to float32
        (``beta=0.99999999`` is); on init or update, if a leaf is masked, complex or not
        floating-point; on update, if ``params`` or ``grad_fn`` is missing or
        ``grad_fn`` returns another structure or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> loss = lambda params, batch: jnp.sum((params - batch) ** 2)
      >>> tx = optax.chain(optax_tricks.barzilai_borwein_step(0.1), optax.sgd(0.1))
      >>> params, batch = jnp.array([1.0, -2.0]), jnp.zeros(2)
      >>> grad_fn = lambda params, step: jax.grad(loss)(params, batch)
      >>> updates, state = tx.update(
      ...     grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates.round(3), f"{optax.tree.get(state, 'bb_step_size'):.3f}")
      [-0.36  0.72] 0.500

    References:
      C. Castera, J. Bolte, C. Févotte, E. Pauwels, [Second-Order Step-Size Tuning of
      SGD for Non-Convex Optimization](https://arxiv.org/abs/2103.03570), 2022

    Note:
      Transforms before this one change only the first gradient. To change both, for
      example by L2 regularization, apply them inside ``grad_fn`` as well.
      `optax.MultiSteps` would call ``grad_fn`` on every mini-step and use only one
      result, so accumulate inside ``grad_fn`` instead. Squares are accumulated in
      float32 (float64 for float64 leaves), which can represent norms from about 1e-19
      to 1e19.

      In a network with dropout or BatchNorm, ``grad_fn`` must repeat the dropout masks
      and keep the running statistics. `optax_tricks.nnx.batch_gradients` makes such a
      function for Flax NNX.

      If a gradient is not finite, or its norm too large, the state stays as it was. The
      update shows the non-finite entries. To skip such steps, wrap what follows:
      ``optax.chain(barzilai_borwein_step(rate), optax.apply_if_finite(optax.sgd(rate),
      5))``. Around the whole chain, `optax.apply_if_finite` would check only the first
      gradient.
    """
    if not callable(learning_rate):
        check_in("learning_rate", learning_rate, "[0, inf)")
    check_in("beta", beta, "[0, 1)")
    check_in("nu", nu, "(0, inf)")
    check_in("min_scale", min_scale, "(0, inf)")
    check_ordered("min_scale", min_scale, "max_scale", max_scale)
    check_in("max_scale", max_scale, "(0, inf)")

    def init_fn(params: optax.Params) -> BarzilaiBorweinStepState:
        check_whole_real_tree(_NAME, params)
        difference = jax.tree.map(
            lambda w: jnp.zeros_like(w, accumulator_dtype(w)), params
        )
        dtype = scalar_dtype(params)
        return BarzilaiBorweinStepState(
            bb_count=jnp.zeros((), jnp.int32),
            bb_step_size=jnp.ones((), dtype),
            bb_curvature=jnp.zeros((), dtype),
            bb_gradient_norm=jnp.zeros((), dtype),
            bb_half_gradient_norm=jnp.zeros((), dtype),
            bb_nonpositive_curvature_count=jnp.zeros((), jnp.int32),
            bb_min_scale_count=jnp.zeros((), jnp.int32),
            bb_max_scale_count=jnp.zeros((), jnp.int32),
            bb_difference=difference,
        )

    def update_fn(
        updates: optax.Updates,
        state: BarzilaiBorweinStepState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BarzilaiBorweinStepState]:
        del extra_args
        params, grad_fn = check_call(_NAME, updates, params, grad_fn)
        dtype = accumulator_dtype(updates, params)
        low, high = jnp.asarray(min_scale, dtype), jnp.asarray(max_scale, dtype)
        decay = jnp.asarray(beta, dtype)
        rate = (
            learning_rate(state.bb_count) if callable(learning_rate) else learning_rate
        )
        scale = state.bb_step_size.astype(dtype)
        half_rate = mergeable(jnp.asarray(rate, dtype) * scale)

        half = map_in(dtype, lambda w, g: w - half_rate * g, params, updates)
        second = evaluate(_NAME, grad_fn, half, updates)

        difference = map_in(
            dtype,
            lambda average, g, h: decay * average + (1 - decay) * (h - g),
            state.bb_difference,
            updates,
            second,
        )
        count = optax.safe_increment(state.bb_count)
        correction = 1 - decay ** count.astype(dtype)
        # The half step is -half_rate * g. So neither the half step nor the corrected
        # average has to be stored as a tree.
        product, *squares = sums_over(dtype, _products, difference, updates, second)
        gradient_norm, half_gradient_norm = map(jnp.sqrt, squares)
        curvature = -half_rate * product / correction
        nonpositive = curvature <= 0
        ratio = (half_rate * gradient_norm) ** 2 / jnp.where(nonpositive, 1, curvature)
        raw = jnp.where(nonpositive, jnp.asarray(nu, dtype), ratio)
        kept = state.bb_step_size.dtype
        new_state = BarzilaiBorweinStepState(
            bb_count=count,
            bb_step_size=jnp.clip(raw, low, high).astype(kept),
            bb_curvature=curvature.astype(kept),
            bb_gradient_norm=gradient_norm.astype(kept),
            bb_half_gradient_norm=half_gradient_norm.astype(kept),
            bb_nonpositive_curvature_count=count_if(
                state.bb_nonpositive_curvature_count, nonpositive
            ),
            bb_min_scale_count=count_if(state.bb_min_scale_count, raw < low),
            bb_max_scale_count=count_if(state.bb_max_scale_count, raw > high),
            bb_difference=difference,
        )
        updates = map_in(dtype, lambda g, h: scale * (g + h), updates, second)
        # These are finite only if all entries of both gradients and the average are.
        is_finite = mergeable(
            jnp.isfinite(gradient_norm + half_gradient_norm + curvature)
        )
        return updates, keep_if(is_finite, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _products(
    difference: jax.Array, g: jax.Array, h: jax.Array
) -> tuple[jax.Array, ...]:
    return difference * g, jnp.square(g), jnp.square(h)
