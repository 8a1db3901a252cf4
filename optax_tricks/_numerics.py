"""Tree arithmetic with accumulation in at least single precision."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

Terms: TypeAlias = Callable[..., tuple[jax.Array, ...]]

# A GPU joins arrays of this size in less time than it launches a kernel.
_LARGEST_JOINED = 1 << 16


def accumulator_dtype(*trees: Any) -> jnp.dtype:
    """Returns the widest dtype among all leaves, and at least float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
    # This promotion is intended, even if the caller forbids implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def scalar_dtype(*trees: Any) -> jnp.dtype:
    """Returns the dtype of the scalars in a state: float32, or float64 for such leaves.

    Real also for complex leaves.
    """
    return jnp.finfo(accumulator_dtype(*trees)).dtype


def map_in(dtype: jnp.dtype, f: Callable[..., jax.Array], *trees: Any) -> Any:
    """Maps f over leaves cast to dtype, and casts back to the first tree's dtypes."""
    return jax.tree.map(
        lambda *x: f(*(jnp.asarray(y, dtype) for y in x)).astype(jnp.result_type(x[0])),
        *trees,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def sums_over(dtype: jnp.dtype, f: Terms, *trees: Any) -> tuple[jax.Array, ...]:
    """Sums each value of f over all entries of real trees.

    A GPU launches at least one kernel for each reduction, however small. There, small
    arrays are joined and reduced as one. Larger arrays are reduced along their last
    axis, all values at once, and what is left of all arrays is joined and added up.

    Args:
      dtype: the dtype of the sums.
      f: maps arrays, one leaf of each tree, to arrays of the same shape. Define it in a
        module, so that a call outside of `jax.jit` is compiled once.
      *trees: trees of one structure and of equal shapes.

    Returns:
      A scalar of dtype for each value of f.
    """
    leaves = [
        tuple(jnp.asarray(x, dtype) for x in arrays)
        for arrays in zip(*map(jax.tree.leaves, trees), strict=True)
    ]
    sums = jax.lax.platform_dependent(
        leaves or [(jnp.zeros(0, dtype),) * len(trees)],
        cuda=functools.partial(_sum_joined, f),
        rocm=functools.partial(_sum_joined, f),
        default=functools.partial(_sum_each, f),
    )
    return tuple(sums)


def _sum_each(f: Terms, leaves: list[tuple[jax.Array, ...]]) -> jax.Array:
    terms = [[jnp.sum(value) for value in f(*arrays)] for arrays in leaves]
    return jnp.stack([sum(column) for column in zip(*terms, strict=True)])


def _sum_joined(f: Terms, leaves: list[tuple[jax.Array, ...]]) -> jax.Array:
    small = [arrays for arrays in leaves if _is_joined(arrays[0])]
    terms = [_sum_rows(f(*arrays)) for arrays in leaves if not _is_joined(arrays[0])]
    if small:
        columns = zip(*small, strict=True)
        joined = [jnp.concatenate([x.ravel() for x in column]) for column in columns]
        terms.append(list(f(*joined)))
    rows = [jnp.concatenate(row) for row in zip(*terms, strict=True)]
    # Without the barrier, XLA would sum each array by itself again.
    return jnp.sum(jax.lax.optimization_barrier(jnp.stack(rows)), axis=1)


def _is_joined(x: jax.Array) -> bool:
    return x.size <= _LARGEST_JOINED and not _is_sharded(x)


def _is_sharded(x: jax.Array) -> bool:
    """Returns whether the type of x, on a mesh with explicit axes, says so."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _sum_rows(values: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Sums values along their last axis in one kernel; to one entry if sharded."""
    if any(map(_is_sharded, values)):
        return [jnp.sum(v).ravel() for v in values]
    zeros = tuple(jnp.zeros((), v.dtype) for v in values)
    sums = jax.lax.reduce(
        values,
        zeros,
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        (values[0].ndim - 1,),
    )
    return [x.ravel() for x in sums]


def materialized(*trees: Any) -> Any:
    """Returns trees that XLA keeps in memory, except on GPUs, where this costs more."""
    return jax.lax.platform_dependent(
        trees,
        cuda=lambda x: x,
        rocm=lambda x: x,
        default=jax.lax.optimization_barrier,
    )


def mergeable(x: jax.Array) -> jax.Array:
    """Returns a scalar that does not keep XLA from merging kernels of a GPU.

    XLA merges kernels of the same shape if they read a common array, but not if all
    that they have in common are scalars. So x becomes an entry of an array there.
    """
    return jax.lax.platform_dependent(
        x, cuda=_from_array, rocm=_from_array, default=lambda x: x
    )


def _from_array(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.broadcast_to(x, 2))[0]


def squares(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the square of each array."""
    return tuple(map(jnp.square, arrays))


def keep_if(condition: jax.Array, new: Any, old: Any) -> Any:
    """Returns new where condition is true, else old: two trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def hold_state(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Makes tx keep its old state in updates whose result is not finite."""

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new_state = tx.update(updates, state, params, **extra_args)
        is_finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]
        return updates, keep_if(jnp.array(is_finite).all(), new_state, state)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def count_if(count: jax.Array, happened: jax.Array) -> jax.Array:
    """Increments count where happened is true. It saturates at the largest int32."""
    return jnp.where(happened, optax.safe_increment(count), count)
