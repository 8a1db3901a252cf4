"""The learning rate over the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

import optax_tricks
from train.errors import UsageError

if TYPE_CHECKING:
    from train.optimizers import OptimizerConfig

SCHEDULES = {
    "constant": "the learning rate all through",
    "step": "times decay_factor at each of the milestones",
    "poly": "(1 - k/n)^0.9",
    "cosine": "half a cosine down to 0",
    "linear": "constant for the first half, then linearly to 0, as pix2pix has it",
    "one_cycle": "up from a 25th in three tenths of the steps, then down to about 0",
    "triangular": "up from a quarter and down again in half periods (cyclical rates)",
    "robbins_monro": "(k + 1)^-0.501",
}
_TRIANGULAR_LOW = 0.25  # of the peak, as Smith (2015) advises


def make_schedule(
    config: OptimizerConfig, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate over the steps of a run.

    Raises:
      UsageError: if the warm-up leaves no step to train.
    """
    warmup_steps = round(config.warmup * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise UsageError(
            f"a warm-up of {config.warmup:g} epochs takes {warmup_steps} of "
            f"{total_steps} steps: shorten it, or train for more epochs"
        )
    main = _main_schedule(config, total_steps, steps_per_epoch, warmup_steps)
    if not warmup_steps:
        return main

    def warm(count: jax.typing.ArrayLike) -> jax.Array:
        rising = main(0) * (count + 1) / (warmup_steps + 1)
        return jnp.where(
            count < warmup_steps, rising, main(jnp.maximum(count - warmup_steps, 0))
        )

    return warm


def _main_schedule(
    config: OptimizerConfig, total_steps: int, steps_per_epoch: int, start: int
) -> optax.Schedule:
    """The schedule from step `start` on, counted from there."""
    peak, steps = config.learning_rate, total_steps - start
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "step":
            at = [epoch * steps_per_epoch - start for epoch in config.milestones]
            factors = dict.fromkeys(at, config.decay_factor)
            return optax.piecewise_constant_schedule(peak, factors)
        case "poly":
            # Not optax's, whose power of a rounded 0 is NaN at the end under jit.
            return lambda count: peak * jnp.maximum(1 - count / steps, 0) ** 0.9
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
        case "linear":
            half = steps // 2
            return optax.polynomial_schedule(peak, 0.0, 1, steps - half, half)
        case "one_cycle":
            return optax.cosine_onecycle_schedule(steps, peak)
        case "triangular":
            half_period = config.half_period * steps_per_epoch
            return optax_tricks.triangular_schedule(
                _TRIANGULAR_LOW * peak, peak, half_period
            )
        case "robbins_monro":
            return lambda count: peak * (jnp.asarray(count, float) + 1) ** -0.501
