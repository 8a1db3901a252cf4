"""Optimizers from their description: a base optimizer with tricks in their places."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from tyro.constructors import PrimitiveConstructorSpec

import optax_tricks

TRICKS = {
    "random": "Random Gradient: one random factor per step on the whole gradient",
    "centralize": "Gradient Centralization: minus its mean for each output unit",
    "barzilai_borwein": "Step-Tuned SGD: a step size from two gradients of a batch",
    "perturbed_unit": "PUGD: a unit step from the gradient at perturbed weights too",
}
_TWO_GRADIENTS = ("barzilai_borwein", "perturbed_unit")


def _parse_tricks(arguments: list[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in arguments[0].split(",") if name.strip())
    _check_tricks(names)
    return names


def _check_tricks(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in TRICKS:
            known = "; ".join(f"{k} ({v})" for k, v in TRICKS.items())
            raise ValueError(f"unknown trick {name!r}; known: {known}")
    if len(set(names)) < len(names):
        raise ValueError(f"a trick is named twice: {','.join(names)}")
    if set(_TWO_GRADIENTS) <= set(names):
        raise ValueError(
            f"{' and '.join(_TWO_GRADIENTS)} both replace the gradient: take one"
        )


Tricks = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME,NAME,...",
        instance_from_str=_parse_tricks,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """SGD with momentum, and the tricks."""

    learning_rate: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum, not dampened; 0 for none."""
    weight_decay: float = 5e-4
    """L2 regularisation of all parameters, entering where a trick's paper has it."""
    schedule: Literal["constant", "cosine", "poly", "robbins_monro"] = "cosine"
    """Decay; poly is (1 - k/n)^0.9, robbins_monro is (k + 1)^-0.501."""
    tricks: Tricks = ()
    """Techniques in the places that their papers give them; `tricks` lists them."""

    def __post_init__(self) -> None:
        _check_tricks(self.tricks)
        if not self.learning_rate > 0:
            raise ValueError(f"learning rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight decay must be >= 0, got {self.weight_decay}")

    @property
    def gradients_per_step(self) -> int:
        """Gradient evaluations that one step costs."""
        return 2 if set(_TWO_GRADIENTS) & set(self.tricks) else 1


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate over the steps of a run."""
    peak = config.learning_rate
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "cosine":
            return optax.cosine_decay_schedule(peak, total_steps)
        case "poly":
            return optax.polynomial_schedule(peak, 0.0, 0.9, total_steps)
        case "robbins_monro":
            return lambda count: peak * (jnp.asarray(count, float) + 1) ** -0.501


def make_optimizer(
    config: OptimizerConfig, total_steps: int, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The chain: two-gradient trick, random, weight decay, centralize, momentum, rate.

    So Random Gradient and PUGD leave the decay alone and Gradient Centralization
    projects it too, as in their papers. Step-Tuned SGD minimises the regularised loss:
    there the decay is part of both gradients, and of what follows.
    """
    schedule = make_schedule(config, total_steps)
    decay = optax.add_decayed_weights(config.weight_decay)
    members = []
    if "barzilai_borwein" in config.tricks:
        step = optax_tricks.barzilai_borwein_step(schedule)
        members.append(_with_l2(step, config.weight_decay))
        decay = optax.identity()
    if "perturbed_unit" in config.tricks:
        members.append(optax_tricks.perturbed_unit_step())
    if "random" in config.tricks:
        members.append(optax_tricks.scale_by_random(key))
    members.append(decay)
    if "centralize" in config.tricks:
        members.append(optax_tricks.centralize())
    if config.momentum > 0:
        members.append(optax.trace(config.momentum))
    return optax.chain(*members, optax.scale_by_learning_rate(schedule))


def _with_l2(
    inner: optax.GradientTransformationExtraArgs, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of weight_decay / 2 |w|^2 to both gradients `inner` sees."""

    def regularised(grads: Any, params: Any) -> Any:
        return optax.tree.add_scale(grads, weight_decay, params)

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        return inner.update(
            regularised(updates, params),
            state,
            params,
            grad_fn=lambda point, step: regularised(grad_fn(point, step), point),
            **extra_args,
        )

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def trick_scalars(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The scalars that the tricks keep for whoever wants to plot them."""
    fields = (
        "random_factor",
        *optax_tricks.PerturbedUnitStepState._fields,
        *optax_tricks.BarzilaiBorweinStepState._fields,
    )
    found = {field: optax.tree.get(opt_state, field) for field in fields}
    return {k: v for k, v in found.items() if isinstance(v, jax.Array) and v.ndim == 0}
