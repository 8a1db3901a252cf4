"""Learning rates over the steps of a run, as functions of numbers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

import optax_tricks
from train.errors import UsageError

SCHEDULES = {
    "constant": "the learning rate throughout",
    "step": "times decay_factor at each of the milestones",
    "poly": "(1 - k/n)^0.9",
    "cosine": "half a cosine down to 0",
    "linear": "constant for the first half, then linearly to 0, as in pix2pix",
    "one_cycle": "up from a 25th in three tenths of the steps, then down to about 0",
    "triangular": "cyclical: up from a quarter in one half period, down in the next",
    "robbins_monro": "(k + 1)^-0.501",
}
_TRIANGULAR_LOW = 0.25  # of the peak, as Smith (2015) advises


def make_schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[int] = (),
    decay_factor: float = 0.1,
    half_period: float = 4.0,
) -> optax.Schedule:
    """Makes the learning rate of each step of a run.

    >>> from train.optim.schedules import make_schedule
    >>> schedule = make_schedule("cosine", peak=0.2, total_steps=10, steps_per_epoch=5)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10)]
    [0.2, 0.1, 0.0]

    Args:
      name: one of `SCHEDULES`.
      peak: the largest learning rate.
      total_steps: steps of the run.
      steps_per_epoch: steps of an epoch.
      warmup_epochs: epochs of linear warm-up to the value at which the schedule starts.
      milestones: epochs after which "step" lowers the rate.
      decay_factor: the factor of "step" at each milestone.
      half_period: epochs in which "triangular" rises, and in which it falls.

    Raises:
      UsageError: if the warm-up leaves no step to train.
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise UsageError(
            f"a warm-up of {warmup_epochs:g} epochs takes {warmup_steps} of "
            f"{total_steps} steps: shorten it, or train for more epochs"
        )
    steps = total_steps - warmup_steps
    at = [epoch * steps_per_epoch - warmup_steps for epoch in milestones]
    main = _main_schedule(
        name,
        peak,
        steps,
        dict.fromkeys(at, decay_factor),
        half_period * steps_per_epoch,
    )
    if not warmup_steps:
        return main

    def warm(step: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(step)
        rising = main(0) * (count + 1) / (warmup_steps + 1)
        after = main(jnp.maximum(count - warmup_steps, 0))
        return jnp.where(count < warmup_steps, rising, after)

    return warm


def _main_schedule(
    name: str, peak: float, steps: int, factors: dict[int, float], half_period: float
) -> optax.Schedule:
    """Makes the schedule after the warm-up, which counts its own steps."""
    match name:
        case "constant":
            return optax.constant_schedule(peak)
        case "step":
            return optax.piecewise_constant_schedule(peak, factors)
        case "poly":
            # optax's takes a power of a rounded 0, which is NaN at the end under jit.
            return lambda count: peak * jnp.maximum(1 - count / steps, 0) ** 0.9
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
        case "linear":
            half = steps // 2
            return optax.polynomial_schedule(peak, 0.0, 1, steps - half, half)
        case "one_cycle":
            return optax.cosine_onecycle_schedule(steps, peak)
        case "triangular":
            return optax_tricks.triangular_schedule(
                _TRIANGULAR_LOW * peak, peak, half_period
            )
        case "robbins_monro":
            return lambda count: peak * (jnp.asarray(count, float) + 1) ** -0.501
    raise UsageError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
