"""What only a GPU can tell, measured in one go within a few minutes.

First, numbers are compared with those of the CPU; if they are wrong, nothing is timed.
Then training steps are timed beside the same steps in PyTorch, compiled by
`torch.compile`, then steps with each technique, then epochs of the training loop. A
part that would take longer than the time that is left is skipped. Every row is on disk
as soon as it is known.

Both sides take turns. In a turn, a step runs as often as takes a fifth of a second, and
the clock stops when the device is done. So neither waits for the host between steps, as
neither does in training. A large matrix product of the same precision takes its turn
too, which shows what the device can do at best.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import models
from benchmarks.canary import check_numbers
from benchmarks.compile import NONE, Precision, abstract_dataset, make_config
from benchmarks.networks import Program, compile_function
from benchmarks.report import Report, open_report, with_range
from benchmarks.steps import make_step
from benchmarks.timing import interleave, ratio
from train.data.config import DataConfig
from train.errors import UsageError, see
from train.optim.config import OptimizerConfig
from train.optim.techniques import TECHNIQUES
from train.output.run_folder import environment
from train.program import open_program
from train.run import Callbacks, train_seed
from train.settings import AnyPath, NameList, Positive, settings
from train.step import Record, TrainState
from train.tasks.classification import ClassificationConfig
from train.tasks.translation import TranslationConfig

Take: TypeAlias = Callable[[int], Any]
"""Takes so many steps. The results are ready soon, or already."""
Write: TypeAlias = Callable[[str, Any], None]
"""Appends a row, a dataclass, to a CSV file of that name."""


CANARY = "canary"

# What is known least comes first, as the time may not suffice for all.
PARTS = {
    CANARY: "numbers beside those of the CPU; if they are wrong, nothing is timed",
    "resnet18": "ResNet-18 for 32x32 images in bfloat16, beside PyTorch",
    "techniques": "ResNet-18 with each technique",
    "resnet50": "ResNet-50 for 224x224 images in bfloat16, beside PyTorch",
    "pix2pix": "generator and discriminator in bfloat16, beside PyTorch",
    "resnet18_float32": "ResNet-18 in float32, with products in TF32",
    "pspnet": "PSPNet-50 in bfloat16, beside PyTorch",
    "training": "epochs of the training loop on a prepared dataset",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A training step to time.

    Attributes:
      network: name of the network; in translation, of the generator.
      batch_size: images in a step.
      precision: precision of the computation.
      seconds: how long the part may take, mostly to compile.
    """

    network: str
    batch_size: int
    precision: Precision = "bfloat16"
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
      steps: the training steps to time beside PyTorch's, by the name of the part.
      techniques: the training step to time with each technique.
      training: the network to train, and for how many epochs.
      rounds: number of rounds, in each of which everything takes a turn.
      turn: seconds of a turn.
      matrix: rows and columns of the matrix product.
    """

    steps: Mapping[str, Subject]
    techniques: Subject
    training: tuple[str, int]
    rounds: int
    turn: float
    matrix: int


# The seconds are guesses.
FULL = Scale(
    steps={
        "resnet18": Subject(network="resnet18_cifar", batch_size=512, seconds=60),
        "resnet50": Subject(network="resnet50", batch_size=256, seconds=90),
        "pix2pix": Subject(network="unet256", batch_size=32, seconds=90),
        "resnet18_float32": Subject(
            network="resnet18_cifar", batch_size=512, precision="float32", seconds=50
        ),
        "pspnet": Subject(network="pspnet50", batch_size=32, seconds=90),
    },
    techniques=Subject(network="resnet18_cifar", batch_size=512, seconds=80),
    training=("resnet18_cifar", 24),
    rounds=10,
    turn=0.2,
    matrix=8192,
)
REHEARSAL = Scale(
    steps={
        "resnet18": Subject(network="resnet20", batch_size=2, seconds=30),
        "pix2pix": Subject(network="unet128", batch_size=1, seconds=30),
        "resnet18_float32": Subject(
            network="resnet20", batch_size=2, precision="float32", seconds=30
        ),
        "pspnet": Subject(network="unet_small", batch_size=1, seconds=30),
    },
    techniques=Subject(network="resnet8", batch_size=2, seconds=30),
    training=("resnet8", 1),
    rounds=3,
    turn=0.0,
    matrix=256,
)
_ABOUT_TORCH = {
    "": "PyTorch is not there or finds no GPU, so our steps are timed alone",
    "compiled": "PyTorch's steps are compiled",
    "eager": "PyTorch runs eagerly: torch.compile needs a GPU and a C compiler",
}


######## Turns ########################################################################


def _take_turns(takes: Mapping[str, Take], scale: Scale) -> dict[str, list[float]]:
    """Returns the seconds of one step in each turn, by name."""
    turns, counts = {}, {}
    for name, take in takes.items():
        jax.block_until_ready(take(1))  # compiles
        start = time.perf_counter()
        jax.block_until_ready(take(1))
        seconds = time.perf_counter() - start
        counts[name] = max(1, math.ceil(scale.turn / seconds))
        turns[name] = functools.partial(take, counts[name])
    found = interleave(turns, scale.rounds)
    return {name: [s / counts[name] for s in times] for name, times in found.items()}


def _matrix_product(scale: Scale, precision: Precision) -> Take:
    # A GPU is faster on constants.
    numbers = jax.random.normal(jax.random.key(0), (scale.matrix, scale.matrix))
    numbers = numbers.astype(precision)
    product = jax.jit(jnp.matmul)

    def take(times: int) -> jax.Array:
        for _ in range(times):
            found = product(numbers, numbers)
        return found

    return take


def _our_step(subject: Subject, technique: str = NONE) -> tuple[Program, Take]:
    """Compiles the training step of a task, as `python -m train` takes it."""
    step, state, batch = make_step(
        subject.network,
        batch_size=subject.batch_size,
        precision=subject.precision,
        technique=technique,
    )
    program = compile_function(step, state, batch, donate_argnums=0)

    def take(times: int) -> Any:
        nonlocal state
        for _ in range(times):
            state, metrics = program.run(state, batch)
        return metrics

    return program, take


######## Training steps beside PyTorch's ##############################################


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepMeasurement:
    """One row of steps.csv.

    Times are medians over the rounds. What is of PyTorch is None without it.

    Attributes:
      network: name of the network; in translation, of the generator.
      batch_size: images in a step.
      image_size: height and width of an image.
      precision: precision of the computation; on both sides, parameters are float32.
      products: precision of matrix products and convolutions, on both sides.
      seconds: time of our step.
      torch_seconds: time of PyTorch's step.
      torch_mode: how PyTorch runs: compiled, eager, failed, or "" if it is not there.
      ratio_median: our time relative to PyTorch's, round by round.
      ratio_low: its 10 % quantile.
      ratio_high: its 90 % quantile.
      step_gflop: billions of FLOPs of our step, as XLA counts them before it optimizes.
      limit_tflops: trillions of FLOPs per second of the matrix product.
      share_of_limit: FLOPs per second of our step, relative to the matrix product.
      torch_share_of_limit: the same for PyTorch, as if its step had our FLOPs.
      step_bytes: arguments, results and temporaries of our compiled step.
      torch_peak_bytes: the most memory that PyTorch had in use; None on a CPU.
      compile_seconds: time to trace and compile our step.
      torch_compile_seconds: time to compile PyTorch's step and run it once.
    """

    network: str
    batch_size: int
    image_size: int
    precision: str
    products: str
    seconds: float
    torch_seconds: float | None = None
    torch_mode: str
    ratio_median: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    step_gflop: float
    limit_tflops: float
    share_of_limit: float
    torch_share_of_limit: float | None = None
    step_bytes: int
    torch_peak_bytes: int | None = None
    compile_seconds: float
    torch_compile_seconds: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.network}, {self.precision}: {1000 * self.seconds:.2f} ms, "
            f"{self.share_of_limit:.0%} of {self.limit_tflops:.0f} TFLOP/s"
        )
        if self.torch_seconds is None:
            return f"{text}; PyTorch failed" if self.torch_mode else text
        spread = with_range(self.ratio_median, self.ratio_low, self.ratio_high)  # type: ignore[arg-type]
        return f"{text}; {1000 * self.torch_seconds:.2f} ms in PyTorch, ratio {spread}"


def torch_mode(*, rehearse: bool) -> str:
    """Returns how PyTorch can run: compiled, eager, or "" if it cannot take part.

    Args:
      rehearse: whether it runs on a CPU, eagerly.
    """
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    if rehearse:
        return "eager"
    if not torch.cuda.is_available():
        return ""
    return "compiled" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "eager"


def _torch_step(subject: Subject, mode: str) -> tuple[float, Take, Callable[[], Any]]:
    """Makes the training step in PyTorch, and runs it once.

    Returns:
      The seconds until it was compiled and had run, the function that takes steps, and
      one that returns the most memory in use since then, in bytes.
    """
    from benchmarks.pytorch import steps

    setup = steps.Setup(
        compiled=mode == "compiled", bfloat16=subject.precision == "bfloat16"
    )
    config = make_config(subject.network, batch_size=subject.batch_size)
    size = models.describe(subject.network).input_shape[0]
    if isinstance(config, TranslationConfig):
        step = steps.pix2pix_step(
            config.generator, config.discriminator, subject.batch_size, size, setup
        )
    else:
        classes = abstract_dataset(subject.network).num_classes
        step = steps.supervised_step(
            subject.network, subject.batch_size, size, classes, setup
        )

    def take(times: int) -> None:
        for _ in range(times):
            step()
        setup.synchronize()

    start = time.perf_counter()
    take(1)
    seconds = time.perf_counter() - start
    setup.reset_peak_bytes()
    return seconds, take, setup.peak_bytes


def measure_step(subject: Subject, mode: str, scale: Scale, write: Write) -> None:
    """Times a training step beside PyTorch's.

    Args:
      subject: the training step.
      mode: how PyTorch runs, as `torch_mode` says.
      scale: how much is measured.
      write: called with the row.
    """
    program, ours = _our_step(subject)
    takes = {"ours": ours, "limit": _matrix_product(scale, subject.precision)}
    if mode:
        try:
            compile_seconds, takes["torch"], peak_bytes = _torch_step(subject, mode)
        except Exception:  # ours is timed all the same
            traceback.print_exc()
            mode = "failed"
    seconds = _take_turns(takes, scale)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    limit = 2 * scale.matrix**3 / medians["limit"]
    of_torch: dict[str, Any] = {}
    if "torch" in takes:
        found = ratio(seconds["ours"], seconds["torch"])
        of_torch = {
            "torch_seconds": medians["torch"],
            "ratio_median": found.median,
            "ratio_low": found.low,
            "ratio_high": found.high,
            "torch_share_of_limit": program.flop / medians["torch"] / limit,
            "torch_peak_bytes": peak_bytes(),
            "torch_compile_seconds": compile_seconds,
        }
    row = StepMeasurement(
        network=subject.network,
        batch_size=subject.batch_size,
        image_size=models.describe(subject.network).input_shape[0],
        precision=subject.precision,
        products="tf32" if subject.precision == "float32" else "bfloat16",
        seconds=medians["ours"],
        torch_mode=mode,
        step_gflop=program.flop / 1e9,
        limit_tflops=limit / 1e12,
        share_of_limit=program.flop / medians["ours"] / limit,
        step_bytes=program.bytes,
        compile_seconds=program.compile_seconds,
        **of_torch,
    )
    write("steps", row)


######## Techniques ###################################################################


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TechniqueMeasurement:
    """One row of techniques.csv.

    Attributes:
      technique: the technique, or `NONE` for SGD alone.
      network: name of the network.
      batch_size: images in a step.
      precision: precision of the computation.
      gradients_per_step: gradient evaluations that one step takes.
      seconds: median time of a training step.
      reference: what it is compared with: SGD, or for two gradients SAM.
      ratio_median: time relative to the reference, round by round.
      ratio_low: its 10 % quantile.
      ratio_high: its 90 % quantile.
      added_seconds: median time beyond the reference, round by round.
      share_of_step: this time as a share of the step.
      step_bytes: arguments, results and temporaries of the compiled step.
      compile_seconds: time to trace and compile the step.
    """

    technique: str
    network: str
    batch_size: int
    precision: str
    gradients_per_step: int
    seconds: float
    reference: str
    ratio_median: float
    ratio_low: float
    ratio_high: float
    added_seconds: float
    share_of_step: float
    step_bytes: int
    compile_seconds: float

    def __str__(self) -> str:
        spread = with_range(self.ratio_median, self.ratio_low, self.ratio_high, ".3f")
        return (
            f"{self.technique}: {1000 * self.seconds:.2f} ms, "
            f"{1000 * self.added_seconds:+.2f} ms ({self.share_of_step:+.1%}) to "
            f"{self.reference}, ratio {spread}"
        )


def measure_techniques(subject: Subject, scale: Scale, write: Write) -> None:
    """Times a training step with each technique, one beside the other.

    Args:
      subject: the training step.
      scale: how much is measured.
      write: called with the row of each technique.
    """
    names = (NONE, *TECHNIQUES)
    steps = {name: _our_step(subject, name) for name in names}
    seconds = _take_turns({name: take for name, (_, take) in steps.items()}, scale)
    for name, (program, _) in steps.items():
        gradients = TECHNIQUES[name].gradients_per_step if name in TECHNIQUES else 1
        reference = "sam" if gradients == 2 and name != "sam" else NONE
        found = ratio(seconds[name], seconds[reference])
        median = statistics.median(seconds[name])
        added = statistics.median(np.subtract(seconds[name], seconds[reference]))
        row = TechniqueMeasurement(
            technique=name,
            network=subject.network,
            batch_size=subject.batch_size,
            precision=subject.precision,
            gradients_per_step=gradients,
            seconds=median,
            reference=reference,
            ratio_median=found.median,
            ratio_low=found.low,
            ratio_high=found.high,
            added_seconds=float(added),
            share_of_step=float(added) / median,
            step_bytes=program.bytes,
            compile_seconds=program.compile_seconds,
        )
        write("techniques", row)


######## The training loop ############################################################


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EpochMeasurement:
    """One row of training.csv.

    Attributes:
      dataset: name of the dataset.
      network: name of the network.
      batch_size: images in a step.
      epoch: number of the epoch, from 1.
      seconds: time of its training steps.
      images_per_second: images that they train on in a second.
      seconds_so_far: time since the start of the training, with evaluations.
      accuracy: the share of test images that are classified right after it.
      compile_seconds: time to compile the step.
    """

    dataset: str
    network: str
    batch_size: int
    epoch: int
    seconds: float
    images_per_second: float
    seconds_so_far: float
    accuracy: float
    compile_seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: {self.images_per_second:,.0f} images/s, accuracy "
            f"{self.accuracy:.2%} after {self.seconds_so_far:.1f} s"
        )


def training_config(
    dataset: str, data_dir: Path | None, scale: Scale
) -> ClassificationConfig:
    """Returns settings that are meant to reach 94 % on CIFAR-10 in few epochs."""
    network, epochs = scale.training
    return ClassificationConfig(
        data=DataConfig(
            dataset=dataset,
            data_dir=data_dir,
            loader="memory",
            augment=("pad_crop", "random_flip"),
        ),
        model=network,
        epochs=epochs,
        batch_size=512,
        precision="bfloat16",
        label_smoothing=0.1,
        optimizer=OptimizerConfig(
            learning_rate=0.4,
            nesterov=True,
            schedule="linear",
            warmup_epochs=epochs / 5,
        ),
    )


def measure_training(config: ClassificationConfig, write: Write) -> None:
    """Trains a network in the loop of `python -m train`, and writes no run.

    Args:
      config: the settings of the run.
      write: called with the row of each epoch.
    """
    program, _ = open_program(config)
    images = config.batch_size * program.steps_before(1)
    start = time.perf_counter()

    class Rows(Callbacks):
        def on_epoch(self, state: TrainState, record: Record) -> None:
            row = EpochMeasurement(
                dataset=config.data.dataset,
                network=config.model,
                batch_size=config.batch_size,
                epoch=int(record["epoch"]),
                seconds=record["seconds"],
                images_per_second=images / record["seconds"],
                seconds_so_far=time.perf_counter() - start,
                accuracy=record["test_accuracy"],
                compile_seconds=program.compile_seconds,
            )
            write("training", row)

    train_seed(program, config.seed, Rows())


######## All of it ####################################################################


class WrongNumbersError(ArithmeticError):
    """The device computes wrong numbers, so its times would mean nothing."""


def measure_numbers(write: Write, *, small: bool) -> None:
    """Compares numbers of the device with those of the CPU.

    Args:
      write: called with the row of each comparison.
      small: whether to compare small arrays.

    Raises:
      WrongNumbersError: if any of them differ too much.
    """
    wrong = []
    for check in check_numbers(small=small):
        write("canary", check)
        if not check.passed:
            wrong.append(check)
    if wrong:
        raise WrongNumbersError(f"wrong numbers: {'; '.join(map(str, wrong))}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of the measurements.

    Attributes:
      name: its name.
      seconds: how long it may take.
      measure: measures, and passes its rows to its argument.
    """

    name: str
    seconds: float
    measure: Callable[[Write], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One row of parts.csv.

    Attributes:
      part: the name of the part.
      estimated_seconds: how long it was expected to take.
      seconds: how long it took.
      outcome: done, skipped or failed.
      reason: why it was skipped, or failed.
    """

    part: str
    estimated_seconds: float
    seconds: float
    outcome: str
    reason: str

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.part} {self.outcome} after {self.seconds:.0f} s{reason}"


def run_part(part: Part, seconds_left: float, write: Write) -> Outcome:
    """Runs a part if there is time for it. What goes wrong does not end the others.

    Args:
      part: the part.
      seconds_left: time left for all parts.
      write: called with each row.
    """
    start, outcome, reason = time.monotonic(), "skipped", ""
    if seconds_left < part.seconds:
        reason = f"it needs about {part.seconds:.0f} s, {seconds_left:.0f} s are left"
    else:
        try:
            part.measure(write)
            outcome = "done"
        except UsageError as error:  # such as a dataset that is not there
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            outcome, reason = "failed", f"{type(error).__name__}: {error}"
        _free_memory()
    return Outcome(
        part=part.name,
        estimated_seconds=part.seconds,
        seconds=time.monotonic() - start,
        outcome=outcome,
        reason=reason,
    )


def _free_memory() -> None:
    """Forgets the programs of a part, and gives back the memory of its arrays."""
    jax.clear_caches()
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.compiler.reset()
        torch.cuda.empty_cache()


def run_parts(parts: Sequence[Part], deadline: float, report: Report) -> list[Outcome]:
    """Runs parts one after the other, and none after one that finds wrong numbers.

    Args:
      parts: the parts.
      deadline: when all of them should be done, on the clock `time.monotonic`.
      report: where rows are written.

    Returns:
      What became of each part that had its turn.
    """
    where = environment() | _more_versions()
    outcomes: list[Outcome] = []

    def write(name: str, row: Any) -> None:
        report.append_row(f"{name}.csv", dataclasses.asdict(row) | where)
        report.console.print(str(row))

    for part in parts:
        outcomes.append(run_part(part, deadline - time.monotonic(), write))
        write("parts", outcomes[-1])
        if part.name == CANARY and outcomes[-1].outcome == "failed":
            report.console.print(
                "The numbers are not known to be right, so nothing is timed; to time "
                "all the same, leave canary out of --parts"
            )
            break
    return outcomes


def _more_versions() -> dict[str, str]:
    """Returns what `environment` leaves out, "" where it is not there."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        (driver, *_) = [*found.stdout.split(), ""]
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    backend = " ".join(jax.devices()[0].client.platform_version.split())
    return {"torch": torch, "driver": driver, "backend": backend}


@settings
class GpuConfig:
    """Measure what only a GPU can tell, within a few minutes."""

    budget: Positive[float] = 540.0
    """Seconds for everything; a part that may take longer than what is left is
    skipped."""
    parts: Annotated[tuple[str, ...], NameList("part", PARTS)] = tuple(PARTS)
    """Parts to measure."""
    dataset: str | None = None
    """Name of a prepared dataset to train on; cifar10 if unset, or digits in a
    rehearsal."""
    data_dir: AnyPath | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""
    rehearse: bool = False
    """Run everything at small sizes, on any device; the times mean nothing."""


def gpu(
    config: Annotated[GpuConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Measure what only a GPU can tell, within a few minutes.

    Args:
      config: what to measure.
      run_dir: folder of the results; a new one under runs/ if unset.
    """
    deadline = time.monotonic() + config.budget
    if not config.rehearse and jax.default_backend() != "gpu":
        raise UsageError(
            f"JAX finds no GPU, but {jax.devices()[0].device_kind}: install its plugin "
            "for CUDA, or try everything at small sizes with --rehearse"
            + see("speed.md#on-a-gpu")
        )
    with open_report("gpu", dataclasses.asdict(config), run_dir) as report:
        mode = torch_mode(rehearse=config.rehearse)
        report.console.print(_ABOUT_TORCH[mode])
        report.folder.start()
        outcomes = run_parts(_parts(config, mode), deadline, report)
    if failed := [o.part for o in outcomes if o.outcome == "failed"]:
        raise UsageError(f"failed: {', '.join(failed)}; see above")


def _parts(config: GpuConfig, mode: str) -> list[Part]:
    """Returns the parts to measure, in their order."""
    scale = REHEARSAL if config.rehearse else FULL
    dataset = config.dataset or ("digits" if config.rehearse else "cifar10")
    training = training_config(dataset, config.data_dir, scale)
    measures: dict[str, tuple[float, Callable[[Write], None]]] = {
        CANARY: (100, functools.partial(measure_numbers, small=config.rehearse)),
        "techniques": (
            scale.techniques.seconds,
            functools.partial(measure_techniques, scale.techniques, scale),
        ),
        "training": (90, functools.partial(measure_training, training)),
    }
    for name, subject in scale.steps.items():
        measure = functools.partial(measure_step, subject, mode, scale)
        measures[name] = (subject.seconds, measure)
    chosen = [name for name in PARTS if name in config.parts and name in measures]
    return [
        Part(name=name, seconds=measures[name][0], measure=measures[name][1])
        for name in chosen
    ]
