"""The scalars of an optimizer state that are worth logging."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

from optax_tricks._validation import is_real_scalar

_Path = tuple[str, ...]


def logged_scalars(state: optax.OptState) -> dict[str, jax.Array]:
    """Returns the numbers in the state of any optimizer by name, for example to log.

    These are the fields of shape () in all states of a chain and of optax's wrappers:
    what a technique did in the latest step, counts, and the hyperparameters of
    `optax.inject_hyperparams`, a seed among them. PRNG keys, arrays and trees like the
    parameters are left out. It works under `jax.jit`.

    Args:
      state: the state of an optimizer, or an `nnx.Optimizer` or a Flax TrainState,
        which hold one as ``opt_state``.

    Returns:
      A dict of scalars, in the order of the state; `jax.jit` returns every dict in
      alphabetical order. A name is that of the field. If several states have such a
      field, the names begin with its place in the state, as in ``0/random_factor`` and
      ``2/random_factor``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_tricks
      >>> tx = optax.chain(
      ...     optax_tricks.scale_by_random(0, minval=0.5, maxval=0.5),
      ...     optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9))
      >>> params = {"w": jnp.ones(3)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> scalars = optax_tricks.logged_scalars(state)
      >>> print({name: round(float(value), 3) for name, value in scalars.items()})
      {'random_factor': 0.5, 'count': 1.0, 'learning_rate': 0.1, 'momentum': 0.9}
    """
    if not isinstance(state, tuple):  # as states of optax are, which may hold others
        state = getattr(state, "opt_state", state)
    found = list(_scalars(state, ()))
    times = Counter(path[-1] for path, _ in found)
    return {
        path[-1] if times[path[-1]] == 1 else "/".join(path): value
        for path, value in found
    }


def _scalars(node: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """Yields the scalar fields of named tuples, and hyperparameters, with their paths.

    Entries of other dicts are no fields, but may be parameters of shape ().
    """
    if hasattr(node, "_asdict"):
        children, are_fields = node._asdict(), True
    elif isinstance(node, tuple | list):
        children, are_fields = dict(enumerate(node)), False
    elif isinstance(node, dict):
        children, are_fields = node, path[-1:] == ("hyperparams",)
    else:
        return
    for name, child in children.items():
        inner = (*path, str(name))
        if are_fields and _is_number(child):
            yield inner, jax.tree.leaves(child)[0]
        else:
            yield from _scalars(child, inner)


def _is_number(x: Any) -> bool:
    """Says whether x is a real number, also inside a variable of Flax NNX."""
    leaves = jax.tree.leaves(x)
    if isinstance(x, Mapping | list | tuple) or len(leaves) != 1:
        return False
    return isinstance(leaves[0], int | float) or is_real_scalar(leaves[0])
