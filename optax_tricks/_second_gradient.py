"""Checks shared by the transforms that evaluate a second gradient."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_tricks._documentation import see
from optax_tricks._validation import check_leaves, join

GradFn: TypeAlias = Callable[[optax.Params, int], optax.Updates]


def check_whole_real_tree(name: str, params: optax.Params) -> None:
    """Raises ValueError for leaves that are masked, complex or not floating-point."""
    for leaf in jax.tree.leaves(params, is_leaf=_is_masked):
        if _is_masked(leaf):
            raise ValueError(
                f"{name} needs all parameters to evaluate grad_fn, but got "
                "optax.MaskedNode leaves, so it is inside optax.masked or "
                "optax.partition. Put it before them, as in "
                f"optax.chain({name}(...), optax.partition(...)). To exclude frozen "
                "parameters, differentiate with respect to the trained ones only."
                + see("faq.md#can-i-use-optaxmasked-or-optaxpartition")
            )
    check_leaves(name, params)
    for leaf in jax.tree.leaves(params):
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"{name} is defined for real parameters, but got a leaf of dtype "
                f"{jnp.result_type(leaf)}. Store the real and imaginary parts as "
                "separate leaves." + see("numerics.md#leaves-and-numbers")
            )


def check_call(
    name: str,
    updates: optax.Updates,
    params: optax.Params | None,
    grad_fn: GradFn | None,
) -> tuple[optax.Params, GradFn]:
    """Returns params and grad_fn, or raises ValueError with the call to write."""
    if params is None or grad_fn is None:
        missing = "params" if params is None else "grad_fn"
        raise ValueError(
            f"{name} evaluates a second gradient on the same mini-batch and got no "
            f"{missing}. Call update(grads, state, params, grad_fn=grad_fn) with, for "
            "example, grad_fn = lambda params, step: jax.grad(loss)(params, batch)."
            " For Flax NNX, optax_tricks.nnx.batch_gradients makes a grad_fn. For Flax "
            "Linen, TrainState.apply_gradients does not pass it on: call "
            "state.tx.update." + see("faq.md#why-does-my-code-say-got-no-grad_fn")
        )
    check_whole_real_tree(name, params)
    check_leaves(name, updates)
    return params, grad_fn


def evaluate(
    name: str, grad_fn: GradFn, point: optax.Params, updates: optax.Updates
) -> optax.Updates:
    """Evaluates the gradient at point and checks its structure and shapes."""
    try:
        gradients = grad_fn(point, 0)
    except Exception as error:
        error.add_note(
            f"{name} called grad_fn(params, 0), where 0 is a step number. The batch is "
            "no argument: grad_fn = lambda params, step: jax.grad(loss)(params, batch)."
            + see("guides/jax.md#two-gradients-per-step")
        )
        raise
    expected, got = _form(updates), _form(gradients)
    if got != expected and got[1] == expected[1]:
        raise ValueError(
            f"{name}: grad_fn must return a tree of the structure of the first "
            "gradient. The shapes agree, but the containers differ"
            f"{_first_difference(gradients, updates)}. For Flax NNX, "
            "optax_tricks.nnx.batch_gradients makes a grad_fn."
            + see("guides/nnx.md#with-nnxoptimizer")
        )
    if got != expected:
        raise ValueError(
            f"{name}: grad_fn must return a tree of the structure and shapes of the "
            f"first gradient, {expected}, but it returned {got}. Use jax.grad, or drop "
            "the value and the auxiliary output of jax.value_and_grad."
            + see("guides/jax.md#two-gradients-per-step")
        )
    return gradients


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _first_difference(got: Any, expected: Any) -> str:
    """Says which leaf has another path. In a list and a tuple, all paths are equal."""
    paths = (
        [join(p) for p, _ in jax.tree.leaves_with_path(x)] for x in (got, expected)
    )
    differences = (
        f": '{a}' in place of '{b}'" for a, b in zip(*paths, strict=True) if a != b
    )
    return next(differences, "")


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]
