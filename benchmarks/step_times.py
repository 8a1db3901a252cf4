"""Times of training steps, each beside another one.

Steps that are compared take turns, so that a slow moment of the machine affects all of
them, and so does a large matrix product, which shows what the machine can do at best.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from benchmarks.compile import NONE
from benchmarks.networks import Program, compile_function, training_step
from benchmarks.steps import make_step
from benchmarks.timing import Ratio, interleave, ratio
from train.optim.techniques import TECHNIQUES

# Images in a batch, and their height and width. Small enough for a laptop, and large
# enough that the machine has work for all its cores.
NETWORKS: Mapping[str, tuple[int, int]] = {
    "resnet8": (32, 32),
    "resnet20": (32, 32),
    "resnet32": (32, 32),
    "resnet44": (32, 32),
    "resnet56": (32, 32),
    "resnet110": (16, 32),
    "resnet18_cifar": (32, 32),
    "resnet34_cifar": (16, 32),
    "resnet50_cifar": (8, 32),
    "resnet101_cifar": (4, 32),
    "resnet18": (4, 224),
    "resnet34": (2, 224),
    "resnet50": (2, 224),
    "resnet101": (2, 224),
    "preact_resnet18": (16, 32),
    "wide_resnet28_10": (4, 32),
    "resnext29_2x64d": (4, 32),
    "resnext29_4x64d": (4, 32),
    "resnext50_32x4d": (2, 224),
    "resnext101_32x4d": (2, 224),
    "vgg11_bn_cifar": (32, 32),
    "vgg16_bn_cifar": (32, 32),
    "vgg11_bn": (2, 224),
    "vgg16_bn": (2, 224),
    "densenet121_cifar": (8, 32),
    "densenet121": (2, 224),
    "mobilenet_v2_cifar": (16, 32),
    "mobilenet_v2": (4, 224),
    "upanet16": (8, 32),
    "upanet32": (8, 32),
    "upanet64": (4, 32),
    "deit_ti_16": (2, 224),
    "deit_b_16": (2, 224),
    "deit_b_16_distilled": (2, 224),
    "vit_b_16": (2, 224),
    "unet_small": (8, 64),
    "pspnet50": (2, 128),
    "pspnet101": (2, 128),
    "resnet50_duc_hdc": (2, 128),
    "resnet101_duc_hdc": (2, 128),
    "unet64_small": (8, 64),
    "unet64": (4, 64),
    "unet128": (1, 128),
    "unet256": (1, 256),
    "patchgan16": (4, 64),
    "patchgan70": (4, 64),
    "pixelgan": (4, 64),
}
# Images in a step of each task, by the name of its network.
TASKS = {"resnet20": 32, "unet_small": 8, "unet64_small": 8}
# Parts of a batch whose gradients are added up.
_PARTS = (1, 2, 4)
# Rows and columns of the matrix product.
_MATRIX = 2048


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One row of the results. Times are medians over the rounds.

    Attributes:
      table: the table that the row is in: network, task, technique or accumulation.
      network: name of the network in the catalogue; in translation, of the generator.
      batch_size: images in a step.
      image_size: height and width of an image.
      technique: name of the technique, or `NONE`.
      grad_accum: parts of the batch whose gradients are added up.
      step_gflop: billions of FLOPs of the step, as XLA counts them before it optimizes.
      seconds: time of the step.
      eager_seconds: time of PyTorch's step; None if it was not timed, as below.
      compiled_seconds: time of PyTorch's compiled step.
      share_of_limit: FLOPs per second of our step, relative to a matrix product.
      compile_seconds: time to trace and compile our step.
      torch_compile_seconds: time to compile PyTorch's step and run it once.
      step_bytes: arguments, results and temporaries of our compiled step.
      reference: what the ratio is to; "" if there is nothing to compare with.
      ratio: our time relative to that of the reference, round by round.
    """

    table: str
    network: str
    batch_size: int
    image_size: int
    technique: str = NONE
    grad_accum: int = 1
    step_gflop: float
    seconds: float
    eager_seconds: float | None = None
    compiled_seconds: float | None = None
    share_of_limit: float
    compile_seconds: float
    torch_compile_seconds: float | None = None
    step_bytes: int
    reference: str = ""
    ratio: Ratio | None = None


######## Beside PyTorch ##############################################################


def measure_network(
    network: str, rounds: int, *, pytorch: bool, compiled: bool
) -> list[StepTime]:
    """Times the training step of one network alone, beside PyTorch's.

    The step is the forward pass, the gradient and SGD with momentum. PyTorch runs it
    eagerly and compiled by `torch.compile`, in the layout that it is fastest in
    (channels_last). The ratio is to the faster of both.

    Args:
      network: name of the network, one of `NETWORKS`.
      rounds: number of rounds, in each of which everything runs once.
      pytorch: whether to time PyTorch too.
      compiled: whether to time its compiled step too.
    """
    batch_size, size = NETWORKS[network]
    channels = models.describe(network).input_shape[-1]
    step, ours = training_step(network, (batch_size, size, size, channels))
    calls, torch_compile_seconds = {"ours": ours, "limit": _matrix_product()}, None
    if pytorch:
        make = functools.partial(_torch_step, network, batch_size, size, channels)
        calls["eager"] = make(compiled=False)
        if compiled:
            calls["compiled"] = make(compiled=True)
            start = time.perf_counter()
            calls["compiled"]()
            torch_compile_seconds = time.perf_counter() - start
    seconds = interleave(calls, rounds)
    medians = {call: float(np.median(times)) for call, times in seconds.items()}
    theirs = [call for call in ("eager", "compiled") if call in calls]
    best = min(theirs, key=medians.__getitem__, default=None)
    row = StepTime(
        table="network",
        network=network,
        batch_size=batch_size,
        image_size=size,
        step_gflop=step.flop / 1e9,
        seconds=medians["ours"],
        eager_seconds=medians.get("eager"),
        compiled_seconds=medians.get("compiled"),
        share_of_limit=step.flop / medians["ours"] / _limit(seconds),
        compile_seconds=step.compile_seconds,
        torch_compile_seconds=torch_compile_seconds,
        step_bytes=step.bytes,
        reference="PyTorch" if best else "",
        ratio=ratio(seconds["ours"], seconds[best]) if best else None,
    )
    return [row]


def _matrix_product() -> Callable[[], jax.Array]:
    matrix = jnp.ones((_MATRIX, _MATRIX))
    product = jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix)


def _limit(seconds: Mapping[Any, Sequence[float]]) -> float:
    """Returns the FLOPs per second of the matrix product."""
    return 2 * _MATRIX**3 / float(np.median(seconds["limit"]))


def _torch_step(
    name: str, batch_size: int, size: int, channels: int, *, compiled: bool
) -> Callable[[], None]:
    """Returns a function that takes a training step in PyTorch."""
    import torch

    from benchmarks.pytorch import NETWORKS

    layout = torch.channels_last
    network = NETWORKS[name]().to(memory_format=layout).train()
    images = torch.randn(batch_size, channels, size, size).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    # Otherwise the second measurement on a machine would time the reading of a cache.
    torch.compiler.config.force_disable_caches = True
    # Otherwise PyTorch compiles the same class for only some networks of a process, and
    # runs all others eagerly.
    torch.compiler.reset()
    forward = torch.compile(network) if compiled else network

    def step() -> None:
        optimizer.zero_grad()
        found = forward(images)
        if isinstance(found, tuple):  # with auxiliary logits
            (found, *_) = found
        found.square().mean().backward()
        optimizer.step()

    return step


######## Beside other steps ############################################################


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A step of `python -m train`, with augmentation, metrics and norms.

    Attributes:
      network: see `StepTime`, as for all others.
    """

    network: str
    batch_size: int
    technique: str = NONE
    grad_accum: int = 1

    def compile(self) -> tuple[Program, Callable[[], Any]]:
        """Compiles the step, and returns a function that takes it."""
        step, state, batch = make_step(**dataclasses.asdict(self))
        program = compile_function(step, state, batch, donate_argnums=0)

        def take() -> Any:
            nonlocal state
            state, metrics = program.run(state, batch)
            return state, metrics

        return program, take


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Turns:
    """The times of steps that took turns.

    Attributes:
      programs: the compiled steps.
      seconds: the seconds of each round, by the step, or by the name of what is none.
    """

    programs: Mapping[_Step, Program]
    seconds: Mapping[Any, Sequence[float]]

    def row(
        self,
        table: str,
        step: _Step,
        reference: str = "",
        reference_seconds: Sequence[float] = (),
    ) -> StepTime:
        """Returns the row of a step, beside the seconds of a reference."""
        program, seconds = self.programs[step], self.seconds[step]
        median = float(np.median(seconds))
        # XLA counts a loop over the parts of a batch once.
        flop = self.programs[dataclasses.replace(step, grad_accum=1)].flop
        return StepTime(
            table=table,
            image_size=models.describe(step.network).input_shape[0],
            step_gflop=flop / 1e9,
            seconds=median,
            share_of_limit=flop / median / _limit(self.seconds),
            compile_seconds=program.compile_seconds,
            step_bytes=program.bytes,
            reference=reference,
            ratio=ratio(seconds, reference_seconds) if reference else None,
            **dataclasses.asdict(step),
        )


def _take_turns(
    steps: Sequence[_Step], rounds: int, **others: Callable[[], Any]
) -> _Turns:
    calls: dict[Any, Callable[[], Any]] = {"limit": _matrix_product(), **others}
    programs = {}
    for step in steps:
        programs[step], calls[step] = step.compile()
    return _Turns(programs=programs, seconds=interleave(calls, rounds))


def measure_task(network: str, rounds: int) -> list[StepTime]:
    """Times the step of a task, beside the step of its network alone.

    A task that trains two networks has nothing beside it.
    """
    entry = models.describe(network)
    step = _Step(network=network, batch_size=TASKS[network])
    if entry.task == "translation":
        return [_take_turns([step], rounds).row("task", step)]
    _, alone = training_step(network, (step.batch_size, *entry.input_shape))
    turns = _take_turns([step], rounds, alone=alone)
    return [turns.row("task", step, "the network alone", turns.seconds["alone"])]


def measure_techniques(network: str, rounds: int) -> list[StepTime]:
    """Times steps with each technique, beside the optimizer of the task alone."""
    plain = _Step(network=network, batch_size=TASKS[network])
    steps = [dataclasses.replace(plain, technique=name) for name in (NONE, *TECHNIQUES)]
    turns = _take_turns(steps, rounds)
    reference = turns.seconds[plain]
    return [turns.row("technique", step, NONE, reference) for step in steps]


def measure_accumulation(network: str, technique: str, rounds: int) -> list[StepTime]:
    """Times steps in parts, beside as many steps on one part each."""
    whole = _Step(network=network, batch_size=TASKS[network], technique=technique)
    steps, parts = {}, {}
    for n in _PARTS:
        steps[n] = dataclasses.replace(whole, grad_accum=n)
        parts[n] = dataclasses.replace(whole, batch_size=whole.batch_size // n)
    turns = _take_turns(list({*steps.values(), *parts.values()}), rounds)
    return [
        turns.row(
            "accumulation",
            steps[n],
            "its parts",
            [n * seconds for seconds in turns.seconds[parts[n]]],
        )
        for n in _PARTS
    ]
