"""What all runs are told, whatever they train; tasks add their own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import jax.numpy as jnp
import tyro
from jax.typing import DTypeLike

from train.data.config import DataConfig
from train.errors import UsageError
from train.optimizers import OptimizerConfig

T = TypeVar("T")
SeedStrategy = Literal["sequential", "vmap", "devices"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Data, optimizer, length and form of a run."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataConfig
    )
    epochs: int = 20
    """Passes over the training examples."""
    batch_size: int = 100
    """Examples in a step, over all devices."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(default_factory=OptimizerConfig)
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters, statistics and optimizer stay float32."""
    ema: float = 0.0
    """Decay of a moving average of the network, which is then evaluated; 0 for none."""
    seed: int = 0
    """Decides parameters, order of examples, augmentation and random tricks."""
    seeds: int = 1
    """Runs from as many seeds, this one and those that follow it."""
    seed_strategy: Literal["auto", SeedStrategy] = "auto"
    """How several seeds share the devices; auto goes by the backend."""
    shard_parameters: bool = False
    """Whether each device keeps a part of parameters and optimizer state only."""
    steps_per_call: int | None = None
    """Steps that the device takes without the host; by the backend if unset."""
    log_every: int = 50
    """Steps between two lines of metrics, and looks for a loss that is not finite."""
    evaluate_every: int = 1
    """Epochs between two evaluations."""
    checkpoint_minutes: float = 1.0
    """Least time between two checkpoints, which are made at the end of epochs."""

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulate", "seeds", "log_every")
        for name in (*counts, "evaluate_every", "steps_per_call"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"accumulate must divide the batch size, {self.batch_size}; got "
                f"{self.accumulate}"
            )
        if not self.checkpoint_minutes >= 0:
            raise UsageError(
                f"checkpoint_minutes must be 0 or more, got {self.checkpoint_minutes}"
            )
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be from 0 to below 1, got {self.ema}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed must be from 0 to 2**31 - 1, got {self.seed}")

    @property
    def dtype(self) -> DTypeLike | None:
        """Of the computation, as `models.create` takes it."""
        return jnp.bfloat16 if self.precision == "bfloat16" else None


def from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """The dataclass that `dataclasses.asdict` and JSON made this of.

    >>> import dataclasses, json
    >>> from train.config import TrainingConfig, from_json
    >>> config = TrainingConfig(epochs=3, seeds=2)
    >>> written = json.dumps(dataclasses.asdict(config))
    >>> from_json(TrainingConfig, json.loads(written)) == config
    True
    """
    hints = get_type_hints(kind)
    values = {
        field.name: _read(hints[field.name], content[field.name])
        for field in dataclasses.fields(kind)
    }
    return kind(**values)


def _read(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in (kind, *get_args(kind)):
        return Path(value)
    return value
