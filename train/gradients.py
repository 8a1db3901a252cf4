"""Gradients of an NNX model that leave BatchNorm and dropout as one forward would.

Networks are kept as a static graph definition and two plain nested dicts of arrays,
the parameters and everything else (BatchNorm statistics, dropout keys): of the ways
to carry an NNX model through a jitted step this costs the host least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

Tree = Any
LossFn = Callable[[nnx.Module, Tree], tuple[jax.Array, Tree]]


class BatchGradients(NamedTuple):
    """What one mini-batch gives.

    Attributes:
      loss: the loss, a scalar.
      aux: what the loss function returned besides.
      grads: the gradient, a tree like the parameters.
      model_state: the state after the forward at the given parameters.
      grad_fn: (params, step) -> gradients on the same mini-batch, with the same
        dropout keys, for members that take a second gradient. The state that its
        forward makes is dropped.
    """

    loss: jax.Array
    aux: Tree
    grads: Tree
    model_state: Tree
    grad_fn: Callable[[Tree, Any], Tree]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A model's graph definition, parameters and other state, both as plain dicts."""
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)


def batch_gradients(
    loss_fn: LossFn,
    graphdef: nnx.GraphDef,
    params: Tree,
    model_state: Tree,
    batch: Tree,
    *,
    accumulate: int = 1,
) -> BatchGradients:
    """Evaluates a loss and its gradient, and makes the `grad_fn` for a second one.

    BatchNorm normalises each forward by its own batch, the second by the activations
    at the perturbed parameters, but the running statistics that go on to the next
    step are those of the first forward, as in plain SGD.

    With `accumulate` the batch is cut into parts that are evaluated one after the
    other, which takes the memory of one. Loss and gradients, the second one too, are
    means over the parts; `aux` is added up. BatchNorm normalises each part by itself,
    and its running statistics move with every part.

    Args:
      loss_fn: (model, batch) -> (loss, aux), a scalar and any tree.
      graphdef: the model's graph definition.
      params: the parameters, as from `split`; an `nnx.State` works as well.
      model_state: all other state, as from `split`; an `nnx.State` works as well.
      batch: any tree of arrays.
      accumulate: number of parts; divides the first axis of every array.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_tricks
      >>> from flax import nnx
      >>> from train.gradients import batch_gradients, split
      >>> model = nnx.Sequential(
      ...     nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> graphdef, params, model_state = split(model)
      >>> loss_fn = lambda model, batch: ((model(batch) - 1.0).var(), None)
      >>> out = batch_gradients(loss_fn, graphdef, params, model_state, jnp.eye(2))
      >>> tx = optax_tricks.pugd(0.1)
      >>> updates, _ = tx.update(
      ...     out.grads, tx.init(params), params, grad_fn=out.grad_fn)
      >>> print(f"{optax.tree.norm(updates):.3f}")
      0.100
    """

    def loss_and_state(
        params: Tree, model_state: Tree, batch: Tree
    ) -> tuple[jax.Array, tuple[Tree, Tree]]:
        # The copy lets an nnx.State be written to under differentiation.
        model = nnx.merge(graphdef, params, model_state, copy=True)
        loss, aux = loss_fn(model, batch)
        state = nnx.state(model, nnx.Not(nnx.Param))
        if not isinstance(model_state, nnx.State):
            state = nnx.to_pure_dict(state)
        return loss, (aux, state)

    value_and_grad = jax.value_and_grad(loss_and_state, has_aux=True)

    def evaluate(params: Tree) -> tuple[Tree, Tree]:
        """Loss, aux and gradients, and the model's state after it."""
        if accumulate == 1:
            (loss, (aux, state)), grads = value_and_grad(params, model_state, batch)
            return (loss, aux, grads), state

        def add(carry: tuple[Tree, Tree], part: Tree) -> tuple[tuple[Tree, Tree], None]:
            totals, state = carry
            (loss, (aux, state)), grads = value_and_grad(params, state, part)
            return (optax.tree.add(totals, (loss, aux, grads)), state), None

        parts = jax.tree.map(lambda x: _cut(x, accumulate), batch)
        shapes = jax.eval_shape(
            value_and_grad, params, model_state, jax.tree.map(lambda x: x[0], parts)
        )
        (loss, (aux, _)), grads = optax.tree.zeros_like(shapes)
        ((loss, aux, grads), state), _ = jax.lax.scan(
            add, ((loss, aux, grads), model_state), parts
        )
        mean = optax.tree.scale(1 / accumulate, (loss, grads))
        return (mean[0], aux, mean[1]), state

    def grad_fn(params: Tree, step: Any) -> Tree:
        del step  # every gradient of a step is taken on the same mini-batch
        (_, _, grads), _ = evaluate(params)
        return grads

    (loss, aux, grads), new_state = evaluate(params)
    return BatchGradients(loss, aux, grads, new_state, grad_fn)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """Every `parts`-th example in one part, so that each has some of every device."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
