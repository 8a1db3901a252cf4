"""Samplers decide which examples are in which step.

The number of a step alone decides its examples. So the position of a run is its step,
and a run that starts again at a step continues as if it had never stopped.
"""

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from train.errors import UsageError


class Sampler(Protocol):
    """Decides which examples are in which step.

    Attributes:
      num_examples: number of all examples.
      batch_size: number of examples in a step.
      seed: numbers that decide everything random; () if nothing is.
    """

    @property
    def num_examples(self) -> int:
        """Number of all examples."""

    @property
    def batch_size(self) -> int:
        """Number of examples in a step."""

    @property
    def seed(self) -> tuple[int, ...]:
        """Numbers that decide everything random; () if nothing is."""

    def steps_before(self, epoch: int) -> int:
        """Returns the number of steps before an epoch; the first epoch is 0."""

    def rows(self, step: int) -> Int[np.ndarray, " batch"]:
        """Returns the numbers of the examples in a step; -1 where there is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class RandomSampler:
    """Draws a new random order in each epoch, for training.

    An epoch has every example exactly once. Where the batch size does not divide the
    number of examples, a batch takes the last examples of one epoch and the first of
    the next.

    >>> sampler = RandomSampler(seed=(0,), num_examples=5, batch_size=2)
    >>> [sampler.steps_before(epoch) for epoch in range(3)]
    [0, 2, 5]
    >>> sorted(int(row) for step in range(5) for row in sampler.rows(step))
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    Attributes:
      seed: numbers that decide the order.
      num_examples: number of all examples.
      batch_size: number of examples in a step.
    """

    seed: tuple[int, ...]
    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.num_examples:
            raise UsageError(
                f"batch_size must be from 1 to {self.num_examples}, the number of "
                f"training examples, got {self.batch_size}"
            )

    def steps_before(self, epoch: int) -> int:
        """Returns the number of steps before an epoch; the first epoch is 0."""
        return epoch * self.num_examples // self.batch_size

    def rows(self, step: int) -> Int[np.ndarray, " batch"]:
        """Returns the numbers of the examples in a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, self.num_examples)
        first, last = (
            _permutation(self.seed, int(epoch), self.num_examples)[places]
            for epoch in (epochs[0], epochs[-1])
        )
        return np.where(epochs == epochs[0], first, last)


@functools.lru_cache(maxsize=4)
def _permutation(seed: tuple[int, ...], epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((*seed, epoch)).permutation(length)


@dataclasses.dataclass(frozen=True, slots=True)
class SequentialSampler:
    """Goes through the examples in order, for evaluation.

    The last batch of an epoch is filled up, and what fills it has the weight 0.

    >>> sampler = SequentialSampler(num_examples=3, batch_size=2)
    >>> sampler.rows(0).tolist(), sampler.rows(1).tolist()
    ([0, 1], [2, -1])
    >>> sampler.weights(1).tolist()
    [1.0, 0.0]

    Attributes:
      num_examples: number of all examples.
      batch_size: number of examples in a step.
    """

    num_examples: int
    batch_size: int

    @property
    def seed(self) -> tuple[int, ...]:
        """Returns (), as nothing is random."""
        return ()

    def steps_before(self, epoch: int) -> int:
        """Returns the number of steps before an epoch; the first epoch is 0."""
        return epoch * math.ceil(self.num_examples / self.batch_size)

    def rows(self, step: int) -> Int[np.ndarray, " batch"]:
        """Returns the numbers of the examples in a step; -1 where there is none."""
        start = step % self.steps_before(1) * self.batch_size
        rows = np.arange(start, start + self.batch_size)
        return np.where(rows < self.num_examples, rows, -1)

    def weights(self, step: int | Int[jax.Array, ""]) -> Float[jax.Array, " batch"]:
        """Returns the weights of the examples in a step, float32.

        The weight is 1 where there is an example and 0 where the batch is filled up.
        The step may be traced, so that this can be called inside a jitted function.
        """
        start = step % self.steps_before(1) * self.batch_size
        there = start + jnp.arange(self.batch_size) < self.num_examples
        return there.astype(jnp.float32)
