"""Optimizers from their description: any base optimizer with any tricks."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
import tyro

import optax_tricks
from train.errors import UsageError
from train.schedules import SCHEDULES, make_schedule
from train.tricks import (
    PLACES,
    TRICKS,
    TWO_GRADIENTS,
    Tricks,
    chain_order,
    check_tricks,
)

__all__ = [
    "OPTIMIZERS",
    "PLACES",
    "SCHEDULES",
    "TRICKS",
    "OptimizerConfig",
    "make_optimizer",
    "make_schedule",
    "trick_scalars",
]

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

_ABOVE_0 = ("above 0 and finite", lambda x: 0 < x < math.inf)
_AT_LEAST_0 = (">= 0 and finite", lambda x: 0 <= x < math.inf)
_BELOW_1 = ("in [0, 1)", lambda x: 0 <= x < 1)
_RANGES = {
    "learning_rate": _ABOVE_0,
    "momentum": _BELOW_1,
    "b2": _BELOW_1,
    "weight_decay": _AT_LEAST_0,
    "clip_norm": _ABOVE_0,
    "warmup": _AT_LEAST_0,
    "decay_factor": _ABOVE_0,
    "half_period": _ABOVE_0,
    "head_learning_rate": _ABOVE_0,
    "random_low": ("finite", math.isfinite),
    "random_high": ("finite", math.isfinite),
    "random_probability": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "sam_rho": _ABOVE_0,
}

OptimizerName = tyro.extras.literal_type_from_choices(OPTIMIZERS)
ScheduleName = tyro.extras.literal_type_from_choices(SCHEDULES)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """A base optimizer, its learning rate over the run, and the tricks."""

    optimizer: OptimizerName = "sgd"
    """Base optimizer; it decides whether decay is L2 or decoupled."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD, not dampened; b1 of Adam, AdamW and LAMB; beta of Muon."""
    nesterov: bool = False
    """Nesterov's momentum, for SGD."""
    b2: float = 0.999
    """Decay of the second moment in Adam, AdamW, LAMB and Muon's Adam."""
    weight_decay: float = 5e-4
    """L2 regularisation or decoupled decay, as the optimizer has it."""
    decay_all: bool = True
    """Decay biases, norms and all else under two dimensions too."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; longer ones are scaled down to it."""
    schedule: ScheduleName = "cosine"
    """How the learning rate changes over the run."""
    warmup: float = 0.0
    """Epochs of linear warm-up to the value at which the schedule starts."""
    milestones: tuple[int, ...] = ()
    """Epochs of the run after which the step schedule lowers the rate."""
    decay_factor: float = 0.1
    """Factor on the rate at each milestone."""
    half_period: float = 4.0
    """Epochs in which the triangular schedule rises, and in which it falls."""
    head_learning_rate: float | None = None
    """Peak learning rate of the last layer, to fine-tune; that of all else if unset."""
    tricks: Tricks = ()
    """Techniques in the order of the chain; `tricks` lists them and their places."""
    random_low: float = 0.0
    """Lower limit of Random Gradient's factor."""
    random_high: float = 1.0
    """Upper limit of Random Gradient's factor."""
    random_probability: float = 1.0
    """Chance of a step to be scaled by Random Gradient."""
    conv_only: bool = False
    """Centralize the gradients of 2-D convolutions only."""
    sam_rho: float = 0.05
    """Distance at which SAM takes the gradient."""

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(choices)
                raise UsageError(f"unknown {name} {value!r}; known: {known}")
        for name, (range_, is_inside) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_inside(value):
                words = name.replace("_", " ")
                raise UsageError(f"{words} must be {range_}, got {value}")
        if self.random_low > self.random_high:
            raise UsageError(
                f"random low {self.random_low} is above random high {self.random_high}"
                ": swap them"
            )
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
        check_tricks(self.tricks)
        if self.head_learning_rate and "barzilai_borwein" in self.tricks:
            raise UsageError(
                "barzilai_borwein probes with one rate for all parameters, got a head "
                f"learning rate of {self.head_learning_rate}: leave one of them out"
            )
        _ = self.chain  # refuses decay in a wrong place

    @property
    def gradients_per_step(self) -> int:
        """Gradient evaluations that one step costs."""
        return 2 if set(TWO_GRADIENTS) & set(self.tricks) else 1

    @property
    def chain(self) -> tuple[str, ...]:
        """The members of the chain by name, as `train.tricks.chain_order` has them."""
        return chain_order(
            self.tricks,
            decoupled=self.optimizer in _DECOUPLED,
            clip=self.clip_norm is not None,
        )


def make_optimizer(
    config: OptimizerConfig,
    *,
    total_steps: int,
    steps_per_epoch: int,
    key: jax.Array,
    head: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """The chain that a configuration describes, ending with the learning rate.

    Args:
      config: which optimizer and tricks; `OptimizerConfig.chain` is their order.
      total_steps: steps of the run, for the schedule.
      steps_per_epoch: steps of an epoch, for what is given in epochs.
      key: of Random Gradient.
      head: dotted paths of the modules that `head_learning_rate` is for, such as
        "classifier.6".

    Raises:
      UsageError: if there is a head learning rate without a head, or the warm-up
        leaves no step to train.
    """
    schedule = make_schedule(config, total_steps, steps_per_epoch)
    members = [_member(name, config, schedule, key) for name in config.chain]
    if config.optimizer == "lamb":
        members.append(optax.scale_by_trust_ratio())
    members.append(optax.scale_by_learning_rate(schedule))
    if config.head_learning_rate is not None:
        if not head:
            raise UsageError(
                f"a head learning rate of {config.head_learning_rate} needs a network "
                "whose last layer is known: leave it out, or take another network"
            )
        factor = config.head_learning_rate / config.learning_rate
        members.append(optax.masked(optax.scale(factor), _part_of(head)))
    return optax.chain(*members)


def _member(
    name: str, config: OptimizerConfig, schedule: optax.Schedule, key: jax.Array
) -> optax.GradientTransformation:
    match name:
        case "random":
            return optax_tricks.scale_by_random(
                key,
                minval=config.random_low,
                maxval=config.random_high,
                probability=config.random_probability,
            )
        case "centralize":
            return optax_tricks.centralize(conv_only=config.conv_only)
        case "barzilai_borwein":
            step = optax_tricks.barzilai_borwein_step(schedule)
            return step if "decay" in config.chain else _with_l2(step, _decay(config))
        case "perturbed_unit":
            return optax_tricks.perturbed_unit_step()
        case "sam":
            return _sam(config.sam_rho)
        case "clip":
            return optax.clip_by_global_norm(config.clip_norm)
        case "decay":
            return _decay(config)
        case "optimizer":
            return _direction(config)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """The base optimizer without decay and rate, in optax's own definition."""
    b1, b2 = config.momentum, config.b2
    match config.optimizer:
        case "sgd" | "sgdw":
            return optax.trace(b1, config.nesterov) if b1 > 0 else optax.identity()
        case "adam" | "adamw":
            return optax.scale_by_adam(b1, b2)
        case "lamb":
            return optax.scale_by_adam(b1, b2, eps=1e-6)
        case "adagrad":
            return optax.scale_by_rss()
        case "rmsprop":
            return optax.scale_by_rms()
        case "muon":
            return optax.contrib.muon(
                learning_rate=-1.0,  # the rate behind it turns the sign
                beta=b1,
                adam_b2=b2,
                muon_weight_dimension_numbers=_kernel_matrices,
            )


def _kernel_matrices(params: Any) -> Any:
    """What Muon takes as matrices: kernels, with all that feeds an output unit as rows.

    Kernels of convolutions are unfolded, those under query, key and value map one axis
    to heads and their dimensions. Embeddings, tokens and biases are left to Adam.
    """

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        *_, parent, name = ("", *_dotted(path).split("."))
        if name != "kernel" or leaf.ndim < 2:
            return None
        projects = leaf.ndim == 3 and parent in ("query", "key", "value")
        inputs = 1 if projects else leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(inputs)), tuple(range(inputs, leaf.ndim))
        )

    return jax.tree.map_with_path(axes, params)


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
    mask = None if config.decay_all else _is_weight
    return optax.add_decayed_weights(config.weight_decay, mask)


def _is_weight(params: Any) -> Any:
    """False for norms and biases, of which those of attention have two dimensions."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.ndim > 1 and _dotted(path[-1:]) != "bias", params
    )


def _part_of(head: tuple[str, ...]) -> Callable[[Any], Any]:
    """A mask of the leaves below the modules of `head`."""

    def mask(params: Any) -> Any:
        names = [_dotted(path) for path, _ in jax.tree.leaves_with_path(params)]
        for module in head:
            if not any(name.startswith(f"{module}.") for name in names):
                raise ValueError(f"no parameters below {module!r} in {names}")
        prefixes = tuple(f"{module}." for module in head)
        return jax.tree.map_with_path(
            lambda path, _: _dotted(path).startswith(prefixes), params
        )

    return mask


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _with_l2(
    inner: optax.GradientTransformationExtraArgs, decay: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the regularisation to both gradients that `inner` sees."""

    def regularised(grads: Any, params: Any) -> Any:
        return decay.update(grads, decay.init(params), params)[0]  # it has no state

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        return inner.update(
            regularised(updates, params),
            state,
            params,
            grad_fn=lambda point, step: regularised(grad_fn(point, step), point),
            **extra_args,
        )

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _sam(rho: float) -> optax.GradientTransformationExtraArgs:
    """The gradient at w + rho g / |g|: SAM around an optimizer that changes nothing."""
    # optax.contrib.normalize would make a zero gradient NaN.
    ascent = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(rho))
    sam = optax.contrib.sam(optax.identity(), ascent, opaque_mode=True)

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args  # SAM takes none that it does not know
        return sam.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(sam.init, update_fn)


def trick_scalars(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The scalars that the tricks keep for whoever wants to plot them."""
    fields = (
        "random_factor",
        *optax_tricks.PerturbedUnitStepState._fields,
        *optax_tricks.BarzilaiBorweinStepState._fields,
    )
    found = {field: optax.tree.get(opt_state, field) for field in fields}
    return {k: v for k, v in found.items() if isinstance(v, jax.Array) and v.ndim == 0}
