"""Tree arithmetic with accumulation in at least single precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulator_dtype(*trees: Any) -> jnp.dtype:
    """Returns the widest dtype among all leaves, and at least float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
    # This promotion is intended, even if the caller forbids implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def map_in(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> Any:
    """Maps f over leaves cast to dtype, and casts back to the first tree's dtypes."""
    return jax.tree.map(
        lambda *x: f(*(jnp.asarray(y, dtype) for y in x)).astype(jnp.result_type(x[0])),
        *trees,
    )


def sum_over(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> jax.Array:
    """Sums f over all entries of real trees. The result is a scalar of dtype."""
    terms = jax.tree.map(
        lambda *x: jnp.sum(f(*(jnp.asarray(y, dtype) for y in x))), *trees
    )
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), dtype))


def norm(dtype: jnp.dtype, tree: optax.Updates) -> jax.Array:
    """Returns the Euclidean norm of all entries of a real tree, a scalar of dtype."""
    return jnp.sqrt(sum_over(dtype, jnp.square, tree))


def count_if(count: jax.Array, happened: jax.Array) -> jax.Array:
    """Increments count where happened is true. It saturates at the largest int32."""
    return jnp.where(happened, optax.safe_increment(count), count)
