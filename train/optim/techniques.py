"""The table of techniques: the one place that says what each of them is.

The command line, the order of a chain, the logs, the studies, the README and the docs
read these rows. To add a technique, write its transform in `optax_tricks` and add a
row.

>>> from train.optim.techniques import TECHNIQUES
>>> TECHNIQUES["perturbed_unit_step"].gradients_per_step
2
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import pydantic

import optax_tricks
from train.errors import UsageError
from train.settings import Finite, Positive, settings


@settings
class TechniqueOptions:
    """The options of the techniques."""

    minval: Finite[float] = 0.0
    """scale_by_random: lower limit of the factor."""
    maxval: Finite[float] = 1.0
    """scale_by_random: upper limit of the factor."""
    probability: Annotated[float, pydantic.Field(ge=0, le=1)] = 1.0
    """scale_by_random: probability that a step is scaled."""
    conv_only: bool = False
    """centralize: act only on gradients of 2-D and higher convolutions."""
    min_scale: Positive[float] = 0.5
    """barzilai_borwein_step: lower limit of the step size."""
    max_scale: Positive[float] = 2.0
    """barzilai_borwein_step: upper limit of the step size; both limits at 1 fix it."""
    rho: Positive[float] = 0.05
    """sam: distance at which the second gradient is taken."""
    norms_only: bool = False
    """sam: move only scales and biases to where the second gradient is taken."""

    def __post_init__(self) -> None:
        for names in (("minval", "maxval"), ("min_scale", "max_scale")):
            low, high = (getattr(self, name) for name in names)
            if low > high:
                raise UsageError(
                    f"{names[0]} {low} is above {names[1]} {high}: swap them"
                )


Build = Callable[
    [TechniqueOptions, optax.Schedule, jax.Array],
    optax.GradientTransformationExtraArgs,
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Technique:
    """One row of the table.

    Attributes:
      name: the name of the transform, which is its name everywhere.
      title: what the paper calls the technique.
      idea: one line that says what it does.
      paper: authors and year.
      url: where the paper is.
      gradients_per_step: gradient evaluations that one step takes.
      options: the fields of `TechniqueOptions` that it reads.
      logged: the scalars of its state that a run logs.
      build: makes the transform from the options, the learning rate and a key.
      regularizes_both: whether L2 decay is part of both gradients, as the technique
        minimizes the regularized loss.
      needs_one_learning_rate: whether all parameters must share one learning rate.
      aliases: ready-to-use optimizers of `optax_tricks` with this technique.
    """

    name: str
    title: str
    idea: str
    paper: str
    url: str
    gradients_per_step: int
    options: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    build: Build
    regularizes_both: bool = False
    needs_one_learning_rate: bool = False
    aliases: tuple[str, ...] = ()


def _sam(rho: float, norms_only: bool) -> optax.GradientTransformationExtraArgs:
    """Returns the gradient at w + rho g / |g|, as SAM takes it."""
    # optax.contrib.normalize would make a zero gradient NaN.
    ascent = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(rho))
    if norms_only:
        ascent = optax.chain(optax.masked(optax.set_to_zero(), _is_kernel), ascent)
    sam = optax.contrib.sam(optax.identity(), ascent, opaque_mode=True)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args  # optax's SAM refuses arguments that it does not know
        return sam.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(sam.init, update_fn)


def _is_kernel(params: optax.Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _scale_each_by_random(key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Multiplies each array of the gradient by a factor of its own in [0, 1)."""

    def update_fn(
        updates: optax.Updates,
        key: jax.Array,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, jax.Array]:
        del params, extra_args
        key, *keys = jax.random.split(key, 1 + len(jax.tree.leaves(updates)))
        keys = jax.tree.unflatten(jax.tree.structure(updates), keys)
        scaled = jax.tree.map(
            lambda g, k: g * jax.random.uniform(k, dtype=g.dtype), updates, keys
        )
        return scaled, key

    # A copy: donating the state must not delete the key of the caller.
    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.copy(key), update_fn
    )


_ROWS = (
    Technique(
        name="scale_by_random",
        title="Random Gradient",
        idea="one random factor in [0, 1) per step on the whole gradient",
        paper="Wei, 2018",
        url="https://arxiv.org/abs/1808.04293",
        gradients_per_step=1,
        options=("minval", "maxval", "probability"),
        logged=("random_factor",),
        build=lambda options, learning_rate, key: optax_tricks.scale_by_random(
            key,
            minval=options.minval,
            maxval=options.maxval,
            probability=options.probability,
        ),
    ),
    Technique(
        name="centralize",
        title="Gradient Centralization",
        idea="each output unit's weight gradient minus its mean",
        paper="Yong et al., 2020",
        url="https://arxiv.org/abs/2004.01461",
        gradients_per_step=1,
        options=("conv_only",),
        build=lambda options, learning_rate, key: optax_tricks.centralize(
            conv_only=options.conv_only
        ),
    ),
    Technique(
        name="barzilai_borwein_step",
        title="Step-Tuned SGD",
        idea="step size from the curvature between two gradients of one mini-batch",
        paper="Castera et al., 2022",
        url="https://arxiv.org/abs/2103.03570",
        gradients_per_step=2,
        options=("min_scale", "max_scale"),
        logged=(
            "bb_count",
            "bb_step_size",
            "bb_curvature",
            "bb_gradient_norm",
            "bb_half_gradient_norm",
            "bb_nonpositive_curvature_count",
            "bb_min_scale_count",
            "bb_max_scale_count",
        ),
        build=lambda options, learning_rate, key: optax_tricks.barzilai_borwein_step(
            learning_rate, min_scale=options.min_scale, max_scale=options.max_scale
        ),
        regularizes_both=True,
        needs_one_learning_rate=True,
        aliases=("step_tuned_sgd",),
    ),
    Technique(
        name="perturbed_unit_step",
        title="PUGD",
        idea="gradient at a unit-length, weight-scaled perturbation, normalized to "
        "length one",
        paper="Tseng et al., 2022",
        url="https://arxiv.org/abs/2110.00199",
        gradients_per_step=2,
        logged=(
            "pugd_perturbation_norm",
            "pugd_gradient_norm",
            "pugd_perturbed_gradient_norm",
            "pugd_zero_count",
        ),
        build=lambda options, learning_rate, key: optax_tricks.perturbed_unit_step(),
        aliases=("pugd",),
    ),
    Technique(
        name="sam",
        title="SAM",
        idea="gradient at weights moved along the gradient; optax's, to compare with",
        paper="Foret et al., 2020",
        url="https://arxiv.org/abs/2010.01412",
        gradients_per_step=2,
        options=("rho", "norms_only"),
        build=lambda options, learning_rate, key: _sam(options.rho, options.norms_only),
    ),
    # What is left of a technique without its idea, to compare with.
    Technique(
        name="scale_by_mean",
        title="Random Gradient without randomness",
        idea="half of the gradient, as the mean of the factor is 0.5",
        paper="Wei, 2018",
        url="https://arxiv.org/abs/1808.04293",
        gradients_per_step=1,
        build=lambda options, learning_rate, key: optax.with_extra_args_support(
            optax.scale(0.5)
        ),
    ),
    Technique(
        name="scale_each_by_random",
        title="Random Gradient for each array",
        idea="a random factor in [0, 1) of its own for each array",
        paper="Wei, 2018",
        url="https://arxiv.org/abs/1808.04293",
        gradients_per_step=1,
        build=lambda options, learning_rate, key: _scale_each_by_random(key),
    ),
    Technique(
        name="scale_by_triangle",
        title="Random Gradient as a wave",
        idea="a factor that rises from 0 to 1 in 10 steps and falls again",
        paper="Wei, 2018",
        url="https://arxiv.org/abs/1808.04293",
        gradients_per_step=1,
        build=lambda options, learning_rate, key: optax.with_extra_args_support(
            optax.scale_by_schedule(optax_tricks.triangular_schedule(0.0, 1.0, 10))
        ),
    ),
    Technique(
        name="optax_centralize",
        title="optax.centralize",
        idea="each slice along the first axis minus its mean, right for other layouts "
        "than that of Flax",
        paper="Yong et al., 2020",
        url="https://arxiv.org/abs/2004.01461",
        gradients_per_step=1,
        build=lambda options, learning_rate, key: optax.with_extra_args_support(
            optax.centralize()
        ),
    ),
    Technique(
        name="normalize",
        title="Normalized gradient",
        idea="the gradient of length one, as in PUGD, but at the weights themselves",
        paper="Tseng et al., 2022",
        url="https://arxiv.org/abs/2110.00199",
        gradients_per_step=1,
        build=lambda options, learning_rate, key: optax.with_extra_args_support(
            optax.normalize_by_update_norm(eps=1e-12)
        ),
    ),
)

TECHNIQUES: dict[str, Technique] = {row.name: row for row in _ROWS}


def markdown_table() -> str:
    """Returns the techniques of the papers as the Markdown table of the README."""
    lines = [
        "| Technique | Transforms | Idea | Gradients per step |",
        "| --- | --- | --- | --- |",
    ]
    for row in _ROWS:
        if row.name in optax_tricks.__all__:
            names = ", ".join(f"`{name}`" for name in (row.name, *row.aliases))
            paper = f"{row.title} ([{row.paper}]({row.url}))"
            lines.append(
                f"| {paper} | {names} | {row.idea} | {row.gradients_per_step} |"
            )
    return "\n".join(lines) + "\n"
