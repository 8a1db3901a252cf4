"""Checks of hyperparameters when a transform is built.

Only Python and NumPy numbers are checked. `optax.inject_hyperparams` and `jax.vmap`
pass traced values, which are not known yet.
"""

import numbers
from typing import Any


def check_in(argument: str, value: Any, interval: str) -> None:
    """Raises ValueError unless value is in an interval such as "[0, 1)"."""
    if not isinstance(value, numbers.Real):
        return
    number = float(value)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):  # NaN fails here too
        raise ValueError(f"{argument} must be in {interval}, got {value}.")


def check_ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises ValueError unless low <= high."""
    numeric = isinstance(low, numbers.Real) and isinstance(high, numbers.Real)
    if numeric and not float(low) <= float(high):
        raise ValueError(
            f"{low_name} must be at most {high_name}, got "
            f"{low_name}={low} and {high_name}={high}."
        )
