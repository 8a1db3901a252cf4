"""Step-Tuned SGD: the published algorithm."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_tricks._barzilai_borwein_step import barzilai_borwein_step
from optax_tricks._numerics import hold_state
from optax_tricks._validation import check_in


def step_tuned_sgd(
    learning_rate: ArrayLike,
    *,
    delta: ArrayLike = 0.001,
    beta: ArrayLike = 0.9,
    nu: ArrayLike = 2.0,
    min_scale: ArrayLike = 0.5,
    max_scale: ArrayLike = 2.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with a step size tuned by the curvature on each mini-batch.

    The updates are descent steps: add them to the parameters. This is
    `barzilai_borwein_step`, which describes the algorithm, followed by a learning rate
    that decays as in the Robbins-Monro algorithm,
    $a_k = \alpha / (k + 1)^{1/2 + \delta}$.

    Args:
      learning_rate: the number alpha, at least 0. To replace the published decay by a
        schedule, use ``optax.chain(barzilai_borwein_step(schedule),
        optax.scale_by_learning_rate(schedule))``.
      delta: the excess of the exponent over one half, in [0, 0.5].
      beta: the decay of the averaged gradient differences, in [0, 1).
      nu: the factor, before clipping, if the curvature is not positive; above 0.
      min_scale: the smallest factor, above 0.
      max_scale: the largest factor, at least ``min_scale``.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its ``update`` needs ``params`` and
      the keyword ``grad_fn(params, step) -> gradients``, and calls it once.

    Raises:
      ValueError: if a setting is no number in its range, such as a schedule,
        and for the reasons that `barzilai_borwein_step` lists.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> loss = lambda params: jnp.sum(params**4 - params**2)
      >>> grad_fn = lambda params, step: jax.grad(loss)(params)
      >>> tx = optax_tricks.step_tuned_sgd(0.1)
      >>> params = jnp.array([0.1, -1.0])
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     grads = grad_fn(params, 0)
      ...     updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(3))
      [ 0.707 -0.707]

    References:
      C. Castera, J. Bolte, C. Févotte, E. Pauwels, [Second-Order Step-Size Tuning of
      SGD for Non-Convex Optimization](https://arxiv.org/abs/2103.03570), 2022

    Note:
      An update costs two gradients. Compare it with other optimizers per gradient
      evaluation and per second too, not only per epoch.

      In a network with dropout or BatchNorm, ``grad_fn`` must repeat the dropout masks
      and keep the running statistics. `optax_tricks.nnx.batch_gradients` makes such a
      function for Flax NNX.

      If a gradient is not finite, the update is not finite either, but the state stays
      as it was. To skip such steps, add a check: ``optax.chain(step_tuned_sgd(0.1),
      optax.apply_if_finite(optax.identity(), 5))``. Around the whole chain,
      `optax.apply_if_finite` would check only the first gradient.
    """
    if callable(learning_rate):
        raise ValueError(
            "step_tuned_sgd has its own decay, so learning_rate must be a number, "
            f"got {learning_rate}. For a schedule, use optax.chain("
            "barzilai_borwein_step(schedule), optax.scale_by_learning_rate(schedule))."
        )
    check_in("learning_rate", learning_rate, "[0, inf)")
    check_in("delta", delta, "[0, 0.5]")

    def schedule(count: ArrayLike) -> jax.Array:
        steps = jnp.asarray(count).astype(jnp.result_type(float)) + 1
        return jnp.asarray(learning_rate * steps ** -(0.5 + delta))

    return hold_state(
        optax.chain(
            barzilai_borwein_step(
                schedule, beta=beta, nu=nu, min_scale=min_scale, max_scale=max_scale
            ),
            optax.scale_by_learning_rate(schedule),
        )
    )
