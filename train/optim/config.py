"""The optimizer settings of a run."""

import itertools
from typing import Annotated

from train.errors import UsageError
from train.optim.chain import PLACES, chain_order, check_order
from train.optim.schedules import SCHEDULES
from train.optim.techniques import TECHNIQUES, Technique, TechniqueOptions
from train.settings import (
    Choice,
    Fraction,
    NameList,
    NonNegative,
    Positive,
    Separated,
    settings,
)

OPTIMIZERS = {
    "sgd": "SGD with momentum; L2 decay",
    "adam": "Adam; L2 decay",
    "adamw": "Adam with decoupled decay",
    "sgdw": "SGD with momentum and decoupled decay",
    "adagrad": "Adagrad; L2 decay",
    "rmsprop": "RMSProp without momentum; L2 decay",
    "lamb": "LAMB: Adam with a trust ratio for each array; decoupled decay",
    "muon": "Muon on kernels, Adam on all else; decoupled decay",
}
_DECOUPLED = ("adamw", "sgdw", "lamb", "muon")
_TECHNIQUES = {name: f"{row.title}: {row.idea}" for name, row in TECHNIQUES.items()}


@settings
class OptimizerConfig(TechniqueOptions):
    """A base optimizer, its learning rate over the run, and the techniques."""

    optimizer: Annotated[str, Choice("optimizer", OPTIMIZERS)] = "sgd"
    """Base optimizer; it decides whether decay is L2 or decoupled."""
    learning_rate: Positive[float] = 0.1
    """Peak learning rate."""
    momentum: Fraction[float] = 0.9
    """Momentum of SGD, without dampening; b1 of Adam, AdamW and LAMB; beta of Muon."""
    nesterov: bool = False
    """Nesterov's momentum, for SGD."""
    b2: Fraction[float] = 0.999
    """Decay of the second moment in Adam, AdamW, LAMB and Muon's Adam."""
    weight_decay: NonNegative[float] = 5e-4
    """L2 regularization or decoupled decay, depending on the optimizer."""
    decay_all: bool = True
    """Decay arrays of fewer than two dimensions too, such as biases and norms."""
    clip_norm: Positive[float] | None = None
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    schedule: Annotated[str, Choice("schedule", SCHEDULES)] = "cosine"
    """How the learning rate changes over the run."""
    warmup_epochs: NonNegative[float] = 0.0
    """Epochs of linear warm-up to the value at which the schedule starts."""
    milestones: Annotated[tuple[int, ...], Separated(int)] = ()
    """Epochs after which the step schedule lowers the learning rate."""
    decay_factor: Positive[float] = 0.1
    """Factor of the step schedule on the learning rate at each milestone."""
    half_period: Positive[float] = 4.0
    """Epochs of each rise, and of each fall, of the triangular schedule."""
    head_learning_rate: Positive[float] | None = None
    """Peak learning rate of the last layer, to fine-tune; `learning_rate` if unset."""
    techniques: Annotated[
        tuple[str, ...], NameList("technique", _TECHNIQUES | PLACES)
    ] = ()
    """Techniques in the order of the chain; `python -m train techniques` lists them."""

    def __post_init__(self) -> None:
        TechniqueOptions.__post_init__(self)
        if self.nesterov and self.optimizer not in ("sgd", "sgdw"):
            raise UsageError(f"nesterov is for sgd and sgdw, not {self.optimizer}")
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0, got 0")
        if any(b <= a for a, b in itertools.pairwise((0, *self.milestones))):
            raise UsageError(
                f"milestones must rise from 1 or more, got {self.milestones}"
            )
        if self.schedule == "step" and not self.milestones:
            raise UsageError("the step schedule needs milestones, such as 60 120 160")
        check_order(self.techniques)
        for row in self._rows:
            if row.needs_one_learning_rate and self.head_learning_rate:
                raise UsageError(
                    f"{row.name} has one learning rate for all parameters, got a "
                    f"head_learning_rate of {self.head_learning_rate}: leave one of "
                    "them out"
                )
        _ = self.chain  # refuses decay in a wrong place

    @property
    def _rows(self) -> list[Technique]:
        """The table rows of the techniques, without the places among their names."""
        return [TECHNIQUES[name] for name in self.techniques if name in TECHNIQUES]

    @property
    def gradients_per_step(self) -> int:
        """Gradient evaluations that one step takes."""
        return max((row.gradients_per_step for row in self._rows), default=1)

    @property
    def logged(self) -> tuple[str, ...]:
        """The names of the scalars that the techniques keep in their states."""
        return tuple(field for row in self._rows for field in row.logged)

    @property
    def chain(self) -> tuple[str, ...]:
        """The names of the chain in order; see `train.optim.chain.chain_order`."""
        return chain_order(
            self.techniques,
            decoupled=self.optimizer in _DECOUPLED,
            clip=self.clip_norm is not None,
        )
