"""Steps with a non-finite gradient: the state stays, and optax's guard skips them."""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks
from tests.optax_tricks.table import (
    DOUBLE,
    LR,
    OPTIMIZERS,
    SINGLE,
    STATES,
    Row,
    assert_equal,
    grad_fn,
    make_params,
    parametrize,
    plain,
    types,
)

DTYPES = ["float32", "bfloat16", "float64"]
# One row of each factory with two gradients.
FACTORIES = {row.factory: row for row in DOUBLE}
two_gradients = parametrize(list(FACTORIES.values()))
BAD = [np.nan, np.inf, -np.inf]


def spoil(grads: Any, bad: Any) -> Any:
    """Adds bad to one entry of one leaf; 0 leaves all as they are."""
    leaf = grads["list"][0]
    return {**grads, "list": [leaf.at[2, 1].add(jnp.asarray(bad, leaf.dtype))]}


@pytest.mark.parametrize("dtype", DTYPES)
@two_gradients
def test_a_non_finite_gradient_leaves_the_state_as_it_was(row: Row, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params, tx = make_params(0, dtype), row.build()
        grads = grad_fn(params, 0)

        @jax.jit
        def update(state: Any, first: Any, second: Any) -> Any:
            again = lambda params, step: spoil(grads, second)  # noqa: E731
            return tx.update(spoil(grads, first), state, params, grad_fn=again)

        _, before = update(tx.init(params), 0.0, 0.0)
        for bad in BAD:
            for pair in ((bad, 0.0), (0.0, bad), (bad, bad), (bad, -bad)):
                updates, after = update(before, *pair)
                assert not jnp.isfinite(updates["list"][0][2, 1])
                assert types(after) == types(before)
                assert_equal(after, before)
        updates, after = update(before, 0.0, 0.0)
        chex.assert_tree_all_finite((updates, after))


# --- The documented ways to skip such steps -------------------------------------------


def guarded(optimizer: Any) -> Any:
    return optax.apply_if_finite(optimizer, 5)


def after(row: Row) -> Any:
    is_complete = row.factory in OPTIMIZERS
    return guarded(optax.identity() if is_complete else optax.sgd(LR, momentum=0.9))


def injected(row: Row) -> Any:
    static = [k for k, v in row.kwargs.items() if callable(v)]
    return optax.inject_hyperparams(row.factory, static_args=static)(**row.kwargs)


def documented(row: Row) -> Any:
    text = re.sub(r"\s+", " ", row.factory.__doc__ or "")
    shown = re.search(r"To skip such steps, [^`]*``(.*?)``\.", text)
    assert shown
    return eval(shown[1], {**vars(optax_tricks), "optax": optax, "rate": LR})


WAYS: dict[str, Callable[[Row], Any]] = {
    "documented": documented,
    "with others and a guard around": lambda row: guarded(
        optax.chain(optax.clip_by_global_norm(1.0), row.build(), after(row))
    ),
    "injected": lambda row: optax.chain(injected(row), after(row)),
}


def steps(tx: Any, row: Row) -> Callable[..., Any]:
    """Returns a function that takes a step for each pair of what spoils a gradient."""

    def step(carry: Any, bad: Any) -> Any:
        params, state = carry
        first, second = bad
        extra = {
            name: lambda params, step: spoil(grad_fn(params, step), second)
            for name in row.extra
        }
        grads = spoil(grad_fn(params, 0), first)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry, bad: jax.lax.scan(step, carry, bad)[0])


def own(state: Any) -> list[Any]:
    """Returns our states in a state of optax."""
    is_ours = lambda x: isinstance(x, STATES)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]


@pytest.mark.parametrize("way", WAYS)
@two_gradients
def test_guards_after_a_transform_skip_bad_steps(row: Row, way: str) -> None:
    params = make_params()
    tx = WAYS[way](row)
    run = steps(tx, row)
    start = params, tx.init(params)
    for bad in BAD:
        pairs = np.array([(0, 0), (0, bad), (bad, 0), (0, bad), (0, 0)], np.float32)
        got = start
        for pair in pairs:
            got = run(got, (pair[:1], pair[1:]))
            chex.assert_tree_all_finite(plain(got))
        expected = start
        for _ in range(2):
            expected = run(expected, (np.zeros(1, np.float32),) * 2)
        assert_equal(got[0], expected[0])
        assert_equal(own(got[1]), own(expected[1]))


@parametrize([row for row in SINGLE if row.id in ("random", "centralize")])
def test_single_gradients_recover_with_the_same_guard(row: Row) -> None:
    params, tx = make_params(), optax.chain(row.build(), after(row))
    run = steps(tx, row)
    for bad in BAD:
        first = np.array([0, bad, 0, 0, 0], np.float32)
        new, state = run((params, tx.init(params)), (first, 0 * np.arange(5.0)))
        chex.assert_tree_all_finite((new, plain(state)))
        assert not jnp.array_equal(new["list"][0], params["list"][0])
