"""What the techniques cost in one update of a ResNet-50.

Times are ratios to a reference in the same round. The tables also have the bytes that
the compiled update moves, as XLA counts them, and the least that any implementation
must move. A plain copy shows what the memory of the machine can do.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import tyro

import optax_tricks
from benchmarks.report import open_report, rows_of, with_range
from benchmarks.timing import Ratio, interleave, ratio
from train.settings import Positive, settings

Tree: TypeAlias = Any
Transform: TypeAlias = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A transform to time.

    Attributes:
      name: its name in tables.
      transform: the transform.
      reference: the name of the subject whose time is 1.
      trees: the least that an update reads and writes, as a number of trees of the size
        of the parameters. It reads every input once and writes every output once. If a
        second gradient is not merged into the update, its point and the gradient itself
        are both written and read.
      grad_fn: the function that computes the second gradient, `quadratic` or `linear`.
    """

    name: str
    transform: Transform
    reference: str
    trees: int
    grad_fn: str = "quadratic"


def _sgd() -> Transform:
    return optax.sgd(0.1, momentum=0.9)


def _sam(outer: Transform) -> Transform:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(outer, adversary, opaque_mode=True)


def _subjects() -> list[Subject]:
    return [
        Subject(name="copy", transform=optax.scale(0.5), reference="copy", trees=2),
        Subject(name="sgd", transform=_sgd(), reference="sgd", trees=4),
        Subject(
            name="scale_by_random, sgd",
            transform=optax.chain(optax_tricks.scale_by_random(0), _sgd()),
            reference="sgd",
            trees=4,
        ),
        Subject(
            name="optax.add_noise, sgd",
            transform=optax.chain(optax.add_noise(0.01, 0.55, 0), _sgd()),
            reference="sgd",
            trees=4,
        ),
        Subject(
            name="optax.centralize",
            transform=optax.centralize(),
            reference="optax.centralize",
            trees=2,
        ),
        Subject(
            name="centralize",
            transform=optax_tricks.centralize(),
            reference="optax.centralize",
            trees=2,
        ),
        Subject(
            name="centralize, sgd",
            transform=optax.chain(optax_tricks.centralize(), _sgd()),
            reference="sgd",
            trees=4,
        ),
        *_two_gradient_subjects("linear"),
        *_two_gradient_subjects("quadratic"),
    ]


def _two_gradient_subjects(grad_fn: str) -> list[Subject]:
    transforms = {
        "sam": _sam(_sgd()),
        "perturbed_unit_step": optax.chain(optax_tricks.perturbed_unit_step(), _sgd()),
        "barzilai_borwein_step": optax.chain(
            optax_tricks.barzilai_borwein_step(0.1), optax.scale_by_learning_rate(0.1)
        ),
    }
    return [
        Subject(
            name=f"{name}, {grad_fn}",
            transform=transform,
            reference=f"sam, {grad_fn}",
            trees=9 if grad_fn == "linear" else 5,
            grad_fn=grad_fn,
        )
        for name, transform in transforms.items()
    ]


def resnet50_shapes() -> dict[str, Any]:
    """Returns the shapes of the 25,557,032 parameters of ResNet-50 for ImageNet."""
    channels = 64
    shapes = {"stem": _conv_and_norm((7, 7, 3, 64))}
    for stage, (blocks, width) in enumerate(
        zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)
    ):
        for i in range(blocks):
            block = {
                "conv1": _conv_and_norm((1, 1, channels, width)),
                "conv2": _conv_and_norm((3, 3, width, width)),
                "conv3": _conv_and_norm((1, 1, width, 4 * width)),
            }
            if i == 0:
                block["shortcut"] = _conv_and_norm((1, 1, channels, 4 * width))
            shapes[f"stage{stage}_block{i}"] = block
            channels = 4 * width
    return shapes | {"head": {"kernel": (2048, 1000), "bias": (1000,)}}


def _conv_and_norm(kernel: tuple[int, ...]) -> dict[str, Any]:
    norm = {"scale": kernel[-1:], "bias": kernel[-1:]}
    return {"conv": {"kernel": kernel}, "norm": norm}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results."""

    part: str
    name: str
    reference: str
    ms: float
    ratio: Ratio
    gigabytes_moved: float | None = None
    gigabytes_least: float | None = None
    gigabytes_per_second: float | None = None


def measure_updates(rounds: int) -> list[Measurement]:
    """Times one jitted update of each subject on a tree of ResNet-50's shapes."""
    shapes = resnet50_shapes()
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), 2 * len(leaves))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, 2 * leaves, strict=True)]
    params = jax.tree.unflatten(treedef, arrays[: len(leaves)])
    grads = jax.tree.unflatten(treedef, arrays[len(leaves) :])
    tree_bytes = sum(x.nbytes for x in jax.tree.leaves(params))

    grad_fns = {
        "linear": _linear_layers(params),
        "quadratic": lambda params, step: jax.tree.map(lambda w: 0.5 * w, params),
    }
    subjects = _subjects()
    calls, moved = {}, {}
    for subject in subjects:
        calls[subject.name], moved[subject.name] = _update_call(
            subject.transform, grads, params, grad_fns[subject.grad_fn]
        )
    seconds = interleave(calls, rounds)
    measurements = []
    for subject in subjects:
        least = subject.trees * tree_bytes / 1e9
        median = statistics.median(seconds[subject.name])
        bytes_moved = moved[subject.name]
        measurements.append(
            Measurement(
                part="update of a ResNet-50",
                name=subject.name,
                reference=subject.reference,
                ms=1000 * median,
                ratio=ratio(seconds[subject.name], seconds[subject.reference]),
                gigabytes_moved=bytes_moved and bytes_moved / 1e9,
                gigabytes_least=least,
                gigabytes_per_second=least / median,
            )
        )
    return measurements


def _linear_layers(params: Tree, examples: int = 128) -> Callable[[Tree, Any], Tree]:
    """Returns the gradient of a squared error, where every kernel is a linear layer.

    No gradient of a network is cheaper at the mini-batch of the papers. The gradient of
    the quadratic loss is cheaper than that of any network, since XLA merges it into the
    update, and stores neither its point nor the gradient.
    """

    def loss(params: Tree, inputs: Tree) -> jax.Array:
        def layer_loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.square(x @ w.reshape(x.shape[1], -1)).mean()

        total: jax.Array = optax.tree.sum(jax.tree.map(layer_loss, params, inputs))
        return total

    def inputs_of(w: jax.Array) -> jax.Array:
        fan_in = w.size // w.shape[-1] if w.ndim > 1 else 1
        return jax.random.normal(jax.random.key(0), (examples, fan_in))

    inputs = jax.tree.map(inputs_of, params)
    return lambda params, step: jax.grad(loss)(params, inputs)


def _update_call(
    transform: Transform, grads: Tree, params: Tree, grad_fn: Callable[..., Tree]
) -> tuple[Callable[[], Tree], float | None]:
    """Returns a function that updates the state, and the bytes that XLA counts.

    It may count none on a GPU.
    """
    transform = optax.with_extra_args_support(transform)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        found: tuple[Tree, Tree] = transform.update(
            grads, state, params, grad_fn=grad_fn
        )
        return found

    state = jax.jit(transform.init)(params)
    compiled = update.lower(grads, state, params).compile()

    def call() -> Tree:
        nonlocal state
        updates, state = compiled(grads, state, params)
        return updates

    costs = compiled.cost_analysis() or {}
    return call, costs.get("bytes accessed")


@settings
class TransformsConfig:
    """Time each technique against transforms of optax."""

    rounds: Positive[int] = 30
    """Number of rounds; each transform is timed once in a round."""


def transforms(
    config: Annotated[TransformsConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Time each technique against transforms of optax.

    Args:
      config: what to time.
      run_dir: folder of the results; a new one under runs/ if unset.
    """
    with open_report("transforms", dataclasses.asdict(config), run_dir) as report:
        report.folder.start()
        with report.console.status("timing updates"):
            measurements = measure_updates(config.rounds)
        report.save_rows(rows_of(measurements))
        for part, reference in dict.fromkeys(map(_group, measurements)):
            group = [m for m in measurements if _group(m) == (part, reference)]
            title = f"{part}, relative to {reference}"
            report.show(_HEADER, list(map(_cells, group)), title)


def _group(m: Measurement) -> tuple[str, str]:
    return m.part, m.reference


_HEADER = ("transform", "ms", "ratio [10 %, 90 %]", "GB/least")


def _cells(m: Measurement) -> tuple[str, ...]:
    cells = (m.name, f"{m.ms:.1f}", with_range(*m.ratio))
    if m.gigabytes_moved is None:
        return (*cells, "")
    return (*cells, f"{m.gigabytes_moved:.2f}/{m.gigabytes_least:.2f}")
