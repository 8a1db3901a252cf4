"""The norms of whole trees."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_tricks._numerics import accumulator_dtype, squares, sums_over
from optax_tricks._second_gradient import check_whole_real_tree


def global_norms(*trees: Any) -> tuple[jax.Array, ...]:
    """Returns the Euclidean norm of all entries of each of several trees.

    The norms are those of `optax.tree.norm`, but a GPU computes them in fewer kernels,
    so that logging several norms of each step costs less.

    Args:
      *trees: trees of one structure with real arrays of equal shapes, such as
        gradients, updates and parameters.

    Returns:
      A scalar for each tree, float32, or float64 if a leaf is float64.

    Raises:
      ValueError: if the shapes of the trees differ, or if a leaf is masked, complex or
        not floating-point.

    Examples:
      >>> import jax.numpy as jnp, optax_tricks
      >>> grads = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.zeros(2)}
      >>> params = {"kernel": jnp.eye(2), "bias": jnp.array([1.0, 1.0])}
      >>> print(*optax_tricks.global_norms(grads, params))
      4.0 2.0
    """
    for tree in trees:
        check_whole_real_tree("global_norms", tree)
        first, shapes = map(_shapes, (trees[0], tree))
        if shapes != first:
            raise ValueError(
                f"global_norms takes trees of equal shapes, got {first} and {shapes}. "
                "Call it once for each."
            )
    sums = sums_over(accumulator_dtype(trees), squares, *trees)
    return tuple(map(jnp.sqrt, sums))


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(tree)]
