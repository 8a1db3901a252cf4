"""PUGD: a unit step from the gradients at the weights and at a perturbation."""

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
    materialized,
    mergeable,
    scalar_dtype,
    squares,
    sums_over,
)
from optax_tricks._second_gradient import (
    GradFn,
    check_call,
    check_whole_real_tree,
    evaluate,
)
from optax_tricks._validation import check_in

_NAME = "perturbed_unit_step"


class PerturbedUnitStepState(NamedTuple):
    """State of `perturbed_unit_step`.

    The norms are those of the latest update whose gradients were finite, and 0 before
    the first. They are float32, or float64 if a leaf of the parameters is float64.

    Attributes:
      pugd_perturbation_norm: float of shape (), the norm of |w| * g, before it is
        scaled to length one. If it is 0, the weights are not perturbed.
      pugd_gradient_norm: float of shape (), the norm of the first gradient g.
      pugd_perturbed_gradient_norm: float of shape (), the norm of the second
        gradient g*.
      pugd_zero_count: int32 of shape (), the number of updates so far in which the
        norm of g* + g was zero, so that no direction could be given.
    """

    pugd_perturbation_norm: jax.Array
    pugd_gradient_norm: jax.Array
    pugd_perturbed_gradient_norm: jax.Array
    pugd_zero_count: jax.Array


def perturbed_unit_step(
    *, eps: ArrayLike = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient at perturbed weights and scales the sum to length one.

    The updates must still be multiplied by a learning rate. With all norms over the
    whole parameter vector,

    $$
    \begin{split}
    \varepsilon &= |w| \odot g(w) \,/\, (\| |w| \odot g(w) \| + \text{eps}) \\
    g^* &= g(w + \varepsilon) \\
    U &= (g^* + g) / \|g^* + g\| ,
    \end{split}
    $$

    so the length of a step is the learning rate, whatever the scale of the loss.

    Args:
      eps: added to the norm that scales the perturbation, at least 0.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PerturbedUnitStepState`. Its
      ``update`` takes the keyword ``grad_fn(params, step) -> gradients``, as
      `optax.contrib.sam` does, and calls it once, with step 0. ``grad_fn`` must use the
      mini-batch of the incoming gradient. Leaves keep their dtype. If g* + g is zero,
      the update is zero.

    Raises:
      ValueError: if ``eps`` is negative or not finite; on init or update, if a leaf is
        masked, complex or not floating-point; on update, if ``params`` or ``grad_fn``
        is missing, or if ``grad_fn`` returns another structure or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> loss = lambda params, batch: 0.5 * jnp.sum((params - batch) ** 2)
      >>> tx = optax.chain(optax_tricks.perturbed_unit_step(), optax.sgd(0.1))
      >>> params, batch = jnp.array([3.0, 4.0]), jnp.zeros(2)
      >>> grad_fn = lambda params, step: jax.grad(loss)(params, batch)
      >>> updates, state = tx.update(
      ...     grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates.round(3), f"{jnp.linalg.norm(updates):.3f}")
      [-0.059 -0.081] 0.100

    References:
      C.-H. Tseng, L.-H. Cheng, S.-J. Lee, X. Zeng, [Perturbated Gradients Updating
      within Unit Space for Deep Learning](https://arxiv.org/abs/2110.00199), 2022

    Note:
      The numerator is the sum of both gradients, as in the authors' figure and training
      script. The authors add weight decay after this transform, as `pugd` does.
      Transforms before this one change only the first gradient. To change both, apply
      them inside ``grad_fn`` as well. `optax.MultiSteps` would call ``grad_fn`` on
      every mini-step and use only one result, so accumulate inside ``grad_fn`` instead.
      Squares are accumulated in float32 (float64 for float64 leaves). So a
      norm below about 1e-19 counts as zero, and a norm above 1e19 makes the update NaN.

      The perturbation has length one, however small the network is. Compare it with
      the norm of the weights, `optax.tree.norm`: a small network without batch
      normalization may not learn. Then try `optax.contrib.sam`, which takes the length.

      In a network with dropout or BatchNorm, ``grad_fn`` must repeat the dropout masks
      and keep the running statistics. `optax_tricks.nnx.batch_gradients` makes such a
      function for Flax NNX.

      If a gradient is not finite, or its norm too large, the state stays as it was, and
      the update is NaN. To skip such steps, wrap what follows:
      ``optax.chain(perturbed_unit_step(), optax.apply_if_finite(optax.sgd(0.1), 5))``.
      Around the whole chain, `optax.apply_if_finite` would check only the first
      gradient.
    """
    check_in("eps", eps, "[0, inf)")

    def init_fn(params: optax.Params) -> PerturbedUnitStepState:
        check_whole_real_tree(_NAME, params)
        zero = jnp.zeros((), scalar_dtype(params))
        return PerturbedUnitStepState(zero, zero.copy(), zero.copy(), jnp.int32(0))

    def update_fn(
        updates: optax.Updates,
        state: PerturbedUnitStepState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbedUnitStepState]:
        del extra_args
        params, grad_fn = check_call(_NAME, updates, params, grad_fn)

        dtype = accumulator_dtype(updates, params)

        weighted_norm, first_norm = map(
            jnp.sqrt, sums_over(dtype, _first_squares, params, updates)
        )
        to_unit = mergeable(_reciprocal(weighted_norm + jnp.asarray(eps, dtype)))
        perturbed = map_in(
            dtype, lambda w, g: w + to_unit * (jnp.abs(w) * g), params, updates
        )
        second = evaluate(_NAME, grad_fn, perturbed, updates)

        # Otherwise XLA writes g* + g to memory to share it between the norm and the
        # update. On a CPU this takes 1.5 times as long as adding twice.
        trees = materialized(updates, second)
        total_norm, other_norm = map(
            jnp.sqrt, sums_over(dtype, _second_squares, *trees)
        )
        kept = state.pugd_gradient_norm.dtype
        new_state = PerturbedUnitStepState(
            pugd_perturbation_norm=weighted_norm.astype(kept),
            pugd_gradient_norm=first_norm.astype(kept),
            pugd_perturbed_gradient_norm=other_norm.astype(kept),
            pugd_zero_count=count_if(state.pugd_zero_count, total_norm == 0),
        )
        to_unit = mergeable(_reciprocal(total_norm))
        updates = map_in(dtype, lambda g, h: to_unit * (g + h), updates, second)
        is_finite = jnp.isfinite(weighted_norm + first_norm + other_norm)
        return updates, keep_if(is_finite, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _first_squares(w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return squares(w * g, g)


def _second_squares(g: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
    return squares(g + h, h)


def _reciprocal(x: jax.Array) -> jax.Array:
    """Returns 1 / x, but 0 for 0, and NaN for a norm that has overflowed."""
    inverse = jnp.where(x == 0, jnp.zeros_like(x), 1 / jnp.where(x == 0, 1, x))
    return jnp.where(jnp.isinf(x), jnp.nan, inverse)
