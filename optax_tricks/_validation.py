"""Checks of hyperparameters when a transform is built, and of the leaves it is given.

The values of Python and NumPy numbers are checked. `optax.inject_hyperparams` and
`jax.vmap` pass traced arrays, whose values are not known yet.
"""

import ctypes
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from optax_tricks._documentation import see

_SMALLEST = float(jnp.finfo(jnp.float32).smallest_normal)


def check_in(argument: str, value: Any, interval: str) -> None:
    """Raises ValueError unless value is in an interval such as "[0, 1)".

    It must also be there as a float32, the dtype that the transforms compute in. A
    number that is not 0 must not become 0. An array of shape () may be traced, so only
    its dtype is checked.
    """
    if not isinstance(value, numbers.Real):
        if not is_real_scalar(value):
            raise ValueError(
                f"{argument} must be a number in {interval}, got {value!r}."
            )
        return
    number, single = float(value), _float32(float(value))
    if not _is_in(number, interval):
        raise ValueError(f"{argument} must be in {interval}, got {value}.")
    if not _is_in(single, interval) or (number and not single):
        raise ValueError(
            f"{argument} must be in {interval}, got {value}, which is {single:g} in "
            "float32."
        )


def check_ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises ValueError unless low <= high."""
    numeric = isinstance(low, numbers.Real) and isinstance(high, numbers.Real)
    if numeric and not float(low) <= float(high):
        raise ValueError(
            f"{low_name} must be at most {high_name}, got "
            f"{low_name}={low} and {high_name}={high}."
        )


def is_real_scalar(x: Any) -> bool:
    """Says whether x is an array of shape () that holds a real number."""
    if not hasattr(x, "dtype"):
        return False
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    is_real = any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    return is_real and jnp.shape(x) == ()


def check_leaves(name: str, tree: Any) -> None:
    """Raises ValueError for leaves that are neither floating-point nor complex."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if is_array or isinstance(leaf, numbers.Number):
            dtype = jnp.result_type(leaf)
            # Floats of 8 bits do not promote to others.
            if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16:
                continue
            found = f"{show_leaf(path, leaf)} has dtype {dtype}"
        else:  # such as a function, in a whole Equinox model
            found = f"'{join(path)}' is of type {type(leaf).__name__}"
        raise ValueError(
            f"{name} takes floating-point leaves of 16 bits or more, but leaf {found}. "
            "Split such leaves off before you differentiate, as "
            "nnx.split(model, nnx.Param, ...) or "
            "equinox.partition(model, equinox.is_inexact_array) does."
            + see("numerics.md#leaves-and-numbers")
        )


def show_leaf(path: tuple[Any, ...], leaf: Any) -> str:
    return f"'{join(path)}' of shape {jnp.shape(leaf)}"


def join(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _float32(number: float) -> float:
    """Rounds to float32. Subnormal numbers become 0, as they do on most devices."""
    single = ctypes.c_float(number).value
    return 0.0 if abs(single) < _SMALLEST else single


def _is_in(number: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below  # False for NaN
