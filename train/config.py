"""The settings that all runs share; tasks add their own."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import pydantic
import tyro
from jax.typing import DTypeLike

from train.data.config import DataConfig
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.settings import Fraction, settings

_AtLeast1 = Annotated[int, pydantic.Field(ge=1)]


@settings
class TrainingConfig:
    """Data, optimizer and length of a run.

    Attributes:
      task: name of the task that a subclass is for.
    """

    task: ClassVar[str]

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataConfig
    )
    epochs: _AtLeast1 = 20
    """Passes over the training examples."""
    batch_size: _AtLeast1 = 100
    """Examples in a step, over all devices."""
    grad_accum: _AtLeast1 = 1
    """Number of parts that a batch is split into, to save memory."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(default_factory=OptimizerConfig)
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; parameters, statistics and optimizer states stay
    float32."""
    ema: Fraction[float] = 0.0
    """Decay of a moving average of the network after each step, which is evaluated and
    exported; 0 for none. Its bias is corrected: the random start has no weight."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    """Seed of parameters, order of examples, augmentation and random factors."""
    seeds: _AtLeast1 = 1
    """Number of runs, whose seeds count up from `seed`."""
    shard_params: bool = False
    """Shard large parameters and optimizer states over the devices."""
    log_every: _AtLeast1 = 50
    """Steps between two lines of metrics, and between two checks of the loss."""
    eval_every: _AtLeast1 = 1
    """Epochs between two evaluations."""
    checkpoint_minutes: Annotated[float, pydantic.Field(ge=0)] = 1.0
    """Least minutes between two checkpoints, which are saved at the end of epochs."""

    def __post_init__(self) -> None:
        if self.batch_size % self.grad_accum:
            raise UsageError(
                f"grad_accum must divide the batch size, {self.batch_size}; got "
                f"{self.grad_accum}"
            )
        if self.seed + self.seeds > 2**31:
            raise UsageError(
                f"seed + seeds must be at most {2**31}, got {self.seed + self.seeds}"
            )

    @property
    def dtype(self) -> DTypeLike | None:
        """The dtype of the computation, as `models.create` takes it."""
        return jnp.bfloat16 if self.precision == "bfloat16" else None

    @property
    def all_seeds(self) -> range:
        """The seeds of the run."""
        return range(self.seed, self.seed + self.seeds)
