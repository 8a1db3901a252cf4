"""The transforms on trees of any structure."""

from collections import OrderedDict
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optax_tricks.table import (
    GRADS,
    PARAMS,
    SINGLE,
    Row,
    assert_close,
    assert_equal,
    every_row,
    grad_fn,
    parametrize,
    plain,
    types,
)


class Pair(NamedTuple):
    x: Any
    y: Any


A, B, C = PARAMS["list"][0], PARAMS["conv"]["bias"], jnp.float32(0.7)
EMPTY = jnp.zeros((0, 3))
TREES = {
    "nested": {"a": {"b": {"c": A}, "d": B}, "e": C},
    "list": [A, [B, [C]]],
    "tuple": (A, (B, C)),
    "namedtuple": Pair(A, Pair(B, C)),
    "ordered": OrderedDict(z=A, y=B, x=C),
    "none": {"a": None, "b": A, "c": [None, B], "d": (C, None)},
    "no-entries": {"a": A, "b": B, "c": C, "d": EMPTY, "e": EMPTY.T},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@every_row
def test_trees(row: Row, tree: Any) -> None:
    tx, flat = row.build(), [A, B, C]
    expected, _ = tx.update(grad_fn(flat, 0), tx.init(flat), flat, **row.extra)
    got, after = tx.update(grad_fn(tree, 0), tx.init(tree), tree, **row.extra)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert types(after) == types(tx.init(tree))
    got = [x for x in jax.tree.leaves(got) if x.size]
    assert_close(sorted(got, key=np.size), sorted(expected, key=np.size))


@every_row
def test_a_bare_array(row: Row) -> None:
    tx = row.build()
    got, _ = tx.update(grad_fn(A, 0), tx.init(A), A, **row.extra)
    listed, _ = tx.update(grad_fn([A], 0), tx.init([A]), [A], **row.extra)
    assert_close([got], listed)


@pytest.mark.parametrize("tree", [{}, (), [], {"a": None}, {"a": [{}, ()]}])
@every_row
def test_empty_trees(row: Row, tree: Any) -> None:
    tx = row.build()
    state = tx.init(tree)
    updates, after = tx.update(tree, state, tree, **row.extra)
    assert updates == tree
    assert types(after) == types(state)
    chex.assert_tree_all_finite(plain(after))


@every_row
def test_numpy_leaves(row: Row) -> None:
    """As a checkpoint may restore them."""
    tx = row.build()
    expected = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    grads, params = jax.device_get((GRADS, PARAMS))
    assert_close(tx.update(grads, tx.init(params), params, **row.extra), expected)


@parametrize(SINGLE)
def test_masked_nodes_stay(row: Row) -> None:
    tx = row.build()
    grads = {"a": A, "b": optax.MaskedNode()}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert updates["b"] == optax.MaskedNode()
    assert_equal(updates["a"], tx.update({"a": A}, tx.init({"a": A}))[0]["a"])


@every_row
def test_python_numbers_as_leaves(row: Row) -> None:
    params = {"a": 1.0, "b": 2.0}
    tx = row.build()
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, grad_fn=lambda p, _: p)
    assert all(jnp.isfinite(u) for u in jax.tree.leaves(updates))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
