"""Arithmetic on trees of arrays that accumulates in at least single precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulator_dtype(*trees: Any) -> jnp.dtype:
    """The widest dtype among all leaves, and at least float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
    # The promotion is wanted, also where a caller forbids implicit ones.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def map_in(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> Any:
    """Maps f over leaves cast to dtype; results get the dtype of the first tree's."""
    return jax.tree.map(
        lambda *x: f(*(jnp.asarray(y, dtype) for y in x)).astype(jnp.result_type(x[0])),
        *trees,
    )


def sum_over(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> jax.Array:
    """The sum of f over all entries of real trees, a scalar of dtype."""
    terms = jax.tree.map(
        lambda *x: jnp.sum(f(*(jnp.asarray(y, dtype) for y in x))), *trees
    )
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), dtype))


def norm(dtype: jnp.dtype, tree: optax.Updates) -> jax.Array:
    """The Euclidean norm of a real tree over all its entries, a scalar of dtype."""
    return jnp.sqrt(sum_over(dtype, jnp.square, tree))


def count_if(count: jax.Array, happened: jax.Array) -> jax.Array:
    """One more where something happened; stays at the largest int32."""
    return jnp.where(happened, optax.safe_increment(count), count)
