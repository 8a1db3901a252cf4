"""Arithmetic on trees of arrays that accumulates in at least single precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulator_dtype(*trees: Any) -> jnp.dtype:
    """The widest dtype among all leaves, and at least float32."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(trees)]
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def map_in(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> Any:
    """Maps f over leaves cast to dtype; results get the dtype of the first tree's."""
    return jax.tree.map(
        lambda x, *rest: f(*(y.astype(dtype) for y in (x, *rest))).astype(x.dtype),
        *trees,
    )


def inner_product(dtype: jnp.dtype, a: optax.Updates, b: optax.Updates) -> jax.Array:
    """The inner product of two real trees over all their entries, a scalar."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))


def norm(dtype: jnp.dtype, tree: optax.Updates) -> jax.Array:
    """The Euclidean norm of a real tree over all its entries, a scalar."""
    return jnp.sqrt(inner_product(dtype, tree, tree))
