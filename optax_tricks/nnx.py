"""Two gradients of a Flax NNX model that update its other state only once.

Transforms such as `optax_tricks.pugd` evaluate a second gradient on the same
mini-batch. In a network with BatchNorm and dropout, that second evaluation must use the
dropout masks of the first and must not change the running statistics.
`batch_gradients` computes the first gradient and returns a ``grad_fn`` for the second
with these properties.

`split` represents a model as a static graph definition and two nested dicts of arrays:
the parameters and all other state, such as BatchNorm statistics and dropout keys. Plain
dicts are the cheapest way to carry an NNX model through a jitted step.

This module needs Flax: ``pip install 'optax_tricks[nnx]'``.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_tricks._documentation import see
from optax_tricks._second_gradient import GradFn

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "optax_tricks.nnx needs Flax 0.12.8 or newer. Install it with: "
        "pip install 'optax_tricks[nnx]'"
    ) from error

__all__ = ["BatchGradients", "batch_gradients", "split"]

Tree: TypeAlias = Any  # a tree of arrays
Loss: TypeAlias = jax.Array | tuple[jax.Array, jax.Array]  # a mean, or (sum, count)
LossFn: TypeAlias = Callable[[Any, Tree], tuple[Loss, Tree]]


class BatchGradients(NamedTuple):
    """The loss and gradients of one mini-batch.

    Attributes:
      loss: the mean loss of the batch, of shape ().
      aux: the auxiliary output of the loss function.
      grads: the gradient, a tree with the structure, shapes and dtypes of the
        parameters.
      model_state: the other state of the model after the forward pass at the given
        parameters.
      grad_fn: a function (params, step) -> gradients on the same mini-batch, with the
        same dropout masks. It ignores ``step`` and discards the model state of its
        forward pass. Pass it to the ``update`` of a transform that evaluates a second
        gradient.
    """

    loss: jax.Array
    aux: Tree
    grads: Tree
    model_state: Tree
    grad_fn: GradFn


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Tree, Tree]:
    """Splits a model into its graph definition, its parameters and its other state.

    Args:
      model: any Flax NNX module.

    Returns:
      The static graph definition and two nested dicts of arrays: the values of all
      `nnx.Param` variables, and those of all other variables.
      ``nnx.merge(graphdef, params, model_state)`` makes a model of the three.

    Examples:
      >>> from flax import nnx
      >>> from optax_tricks.nnx import split
      >>> graphdef, params, model_state = split(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> sorted(params), sorted(model_state)
      (['bias', 'scale'], ['mean', 'var'])
      >>> nnx.merge(graphdef, params, model_state).mean.shape
      (2,)
    """
    graphdef, params, *others = nnx.split(model, nnx.Param, ...)
    (model_state,) = others
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)


def batch_gradients(
    loss_fn: LossFn,
    graphdef: nnx.GraphDef[Any],
    params: Tree,
    model_state: Tree,
    batch: Tree,
    *,
    grad_accum_steps: int = 1,
) -> BatchGradients:
    """Evaluates a loss and its gradient, and makes the ``grad_fn`` for a second one.

    BatchNorm normalizes each forward pass by the statistics of its own activations, so
    the second pass uses the activations at the perturbed parameters. Only the
    first pass moves the running statistics, as in plain SGD.

    With ``grad_accum_steps`` above 1 the batch is cut into that many parts of equal
    size, which are evaluated one after the other with the memory of one part. The loss
    and both gradients are those of the whole batch, and ``aux`` is the sum over the
    parts. Gradients are added up in at least float32. BatchNorm normalizes each part by
    itself, and its running statistics move with each part.

    Args:
      loss_fn: a function (model, batch) -> (loss, aux). ``aux`` is any tree of arrays
        or None. The loss is either a mean over the examples of its batch, of shape (),
        or a pair (sum, count) of such arrays, whose ratio is minimized. Return a pair
        if the number of items differs between parts, as the number of labeled pixels
        or of unmasked tokens does: the sums of all parts are divided by their total
        count. The count, which may also be a sum of weights, is not differentiated. A
        batch with a count of 0 has a loss of 0.
      graphdef: the graph definition of the model, from `split`.
      params: the parameters, from `split`; an `nnx.State` works as well. Those that are
        part of ``model_state`` instead are frozen.
      model_state: all other state, from `split`; an `nnx.State` works as well.
      batch: any tree of arrays. With ``grad_accum_steps`` above 1, the first axis of
        every array counts the examples.
      grad_accum_steps: the number of parts, at least 1; it must divide the first axis
        of every array in ``batch``.

    Returns:
      A `BatchGradients`.

    Raises:
      ValueError: if ``grad_accum_steps`` is no int of at least 1, or does not divide
        the first axis of an array in ``batch``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_tricks
      >>> from flax import nnx
      >>> from optax_tricks.nnx import batch_gradients, split
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
    if not isinstance(grad_accum_steps, numbers.Integral) or grad_accum_steps < 1:
        raise ValueError(
            f"grad_accum_steps must be an int of at least 1, got {grad_accum_steps!r}."
        )

    # Frozen parameters are variables of nnx.Param too, but part of the model state.
    differentiated = nnx.traversals.flatten_mapping(params)

    def mean_loss(
        params: Tree, model_state: Tree, batch: Tree
    ) -> tuple[jax.Array, tuple[jax.Array, Tree, Tree]]:
        # Without the copy, an nnx.State could not be written to under differentiation.
        model = nnx.merge(graphdef, params, model_state, copy=True)
        loss, aux = _pair(loss_fn(model, batch))
        mean, count = _mean_and_count(loss)
        state: Tree = nnx.state(model, lambda path, _: path not in differentiated)
        if not isinstance(model_state, nnx.State):
            state = nnx.to_pure_dict(state)
        return mean, (count, aux, state)

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def evaluate(params: Tree) -> tuple[tuple[jax.Array, Tree, Tree], Tree]:
        """Returns (loss, aux, gradients) and the model state after the forward pass."""
        if grad_accum_steps == 1:
            (loss, (_, aux, state)), grads = value_and_grad(params, model_state, batch)
            return (loss, aux, grads), state

        def sums(state: Tree, part: Tree) -> tuple[tuple[Tree, ...], Tree]:
            (loss, (count, aux, state)), grads = value_and_grad(params, state, part)
            loss, grads = optax.tree.scale(count, (loss, grads))
            return (loss, count, aux, grads), state

        def add(carry: tuple[Tree, Tree], part: Tree) -> tuple[tuple[Tree, Tree], None]:
            totals, state = carry
            found, state = sums(state, part)
            return (optax.tree.add(totals, found), state), None

        parts = jax.tree.map(lambda x: _cut(x, grad_accum_steps), batch)
        shapes, _ = jax.eval_shape(
            sums, model_state, jax.tree.map(lambda x: x[0], parts)
        )
        zeros = optax.tree.zeros_like(shapes)
        (totals, state), _ = jax.lax.scan(add, (zeros, model_state), parts)
        loss, count, aux, grads = totals
        loss, grads = jax.tree.map(lambda x: x / _nonzero(count), (loss, grads))
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return (loss, aux, grads), state

    def grad_fn(params: Tree, step: Any) -> Tree:
        del step  # Every gradient of a step is taken on the same mini-batch.
        (_, _, grads), _ = evaluate(params)
        return grads

    (loss, aux, grads), new_state = evaluate(params)
    return BatchGradients(loss, aux, grads, new_state, grad_fn)


def _pair(result: Any) -> tuple[Loss, Tree]:
    """Returns what a loss function returned, if it is a pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"{len(result)} values" if isinstance(result, tuple) else "one value"
        raise ValueError(
            f"loss_fn must return a pair (loss, aux), got {found}. Return None as aux "
            "if there is nothing else to return."
            + see("guides/nnx.md#what-batch_gradients-takes-care-of")
        )
    return result


def _mean_and_count(loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss and its count; that of a plain mean is 1."""
    if not isinstance(loss, tuple):
        return loss, jnp.ones((), jnp.promote_types(loss.dtype, jnp.float32))
    total, count = loss
    dtype = jnp.promote_types(total.dtype, jnp.float32)
    count = jax.lax.stop_gradient(jnp.asarray(count, dtype))
    return total / _nonzero(count), count


def _nonzero(count: jax.Array) -> jax.Array:
    return jnp.where(count > 0, count, 1)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """Cuts an array into parts of equal size, stacked along a new first axis.

    A part takes every `parts`-th example. So each part has examples of every device
    when the first axis is sharded.
    """
    if not x.ndim or x.shape[0] % parts:
        raise ValueError(
            "grad_accum_steps must divide the first axis of every array in the batch, "
            f"got grad_accum_steps={parts} and an array of shape {x.shape}."
            + see("guides/two_gradients.md#gradient-accumulation")
        )
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
