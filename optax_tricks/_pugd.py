"""PUGD: the published optimizer."""

import optax
from jax.typing import ArrayLike

from optax_tricks._numerics import hold_state
from optax_tricks._perturbed_unit_step import perturbed_unit_step
from optax_tricks._validation import check_in


def pugd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum on the unit directions of `perturbed_unit_step`.

    The updates are descent steps: add them to the parameters. With the unit direction
    $U_k$ of `perturbed_unit_step`,

    $$
    m_k = \mu m_{k-1} + U_k + \lambda w_k, \quad w_{k+1} = w_k - \eta_k m_k .
    $$

    Args:
      learning_rate: a number or a schedule, at least 0. The authors use 0.1 with a
        cosine decay.
      momentum: the factor mu, in [0, 1).
      weight_decay: the factor lambda, at least 0. Weight decay is added after the
        normalization, as in the authors' code, which uses 5e-4.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its ``update`` needs ``params`` and
      the keyword ``grad_fn(params, step) -> gradients``, and calls it once.

    Raises:
      ValueError: if a setting is no number in its range, and for the reasons that
        `perturbed_unit_step` lists.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> loss = lambda params: jnp.sum((params - 3.0) ** 2)
      >>> grad_fn = lambda params, step: jax.grad(loss)(params)
      >>> tx = optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 200))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     grads = grad_fn(params, 0)
      ...     updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(1))
      [3. 3.]

    References:
      C.-H. Tseng, L.-H. Cheng, S.-J. Lee, X. Zeng, [Perturbated Gradients Updating
      within Unit Space for Deep Learning](https://arxiv.org/abs/2110.00199), 2022

    Note:
      An update costs two gradients. Compare it with other optimizers per gradient
      evaluation and per second too, not only per epoch. The steps do not shrink near a
      minimum, so use a learning rate that decays. As in `optax.sgd`, a float32
      array for a hyperparameter widens bfloat16 leaves; a Python number does not.

      The perturbation has length one, however small the network is. Compare it with
      the norm of the weights, `optax.tree.norm`: a small network without batch
      normalization may not learn. Then try `optax.contrib.sam`, which takes the length.

      In a network with dropout or BatchNorm, ``grad_fn`` must repeat the dropout masks
      and keep the running statistics. `optax_tricks.nnx.batch_gradients` makes such a
      function for Flax NNX.

      If a gradient is not finite, the update is not finite either, but the state stays
      as it was, momentum included. To skip such steps, add a check: ``optax.chain(
      pugd(0.1), optax.apply_if_finite(optax.identity(), 5))``. Around the whole chain,
      `optax.apply_if_finite` would check only the first gradient.
    """
    if not callable(learning_rate):
        check_in("learning_rate", learning_rate, "[0, inf)")
    check_in("momentum", momentum, "[0, 1)")
    check_in("weight_decay", weight_decay, "[0, inf)")
    return hold_state(
        optax.chain(
            perturbed_unit_step(),
            optax.add_decayed_weights(weight_decay),
            optax.trace(momentum),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
