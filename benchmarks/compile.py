"""What the compiler makes of a training step, on devices that need not be there.

The whole step of a task is compiled as a run would compile it, from the shapes of its
state and of a batch alone. The rows have memory, FLOPs, kernels, convolutions and
collectives of the compiled program. They have no times, as nothing runs.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import jax
import tyro

import models
from benchmarks import hlo
from benchmarks.report import ROWS, Row, open_report
from benchmarks.targets import Target, find_target
from train.config import TrainingConfig
from train.data.config import DataConfig
from train.data.dataset import Dataset, Field, Reader, Split
from train.data.loaders import GrainLoader
from train.errors import UsageError
from train.optim.techniques import TECHNIQUES
from train.output.run_folder import environment
from train.parallel import make_mesh
from train.program import Plan
from train.progress import shown_on
from train.settings import NameList, Positive, Separated, settings
from train.tasks import TASKS

Precision: TypeAlias = Literal["float32", "bfloat16"]

# The optimizer of the task alone.
NONE = "none"

_IMAGE = Field(feature="image", kind="image", channels=3)
_FIELDS = {
    "classification": {"image": _IMAGE, "label": Field(feature="label", kind="label")},
    "segmentation": {"image": _IMAGE, "mask": Field(feature="mask", kind="mask")},
    "translation": {
        "input": dataclasses.replace(_IMAGE, half="a"),
        "target": dataclasses.replace(_IMAGE, half="b"),
    },
}
_NUM_CLASSES = 10
_NUM_EXAMPLES = 50_000

# What the TPU compiler says of a program that does not fit.
_NEEDED = (
    r"required for HLO temporaries \(([\d.]+)([KMG])\)",
    r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm",
)

_SMALL = ("resnet20", "unet_small", "unet64_small")
_TECHNIQUES = {NONE: "the optimizer alone"} | {
    name: row.title for name, row in TECHNIQUES.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A training step to compile.

    Attributes:
      target: the name of the devices.
      network: the name of the network; in translation, of the generator.
      technique: the name of the technique, or `NONE`.
      batch_size: images in a step, over all chips.
      precision: precision of the computation.
      shard_params: whether large parameters are sharded over the chips.
    """

    target: str
    network: str
    technique: str
    batch_size: int
    precision: Precision
    shard_params: bool

    @property
    def task(self) -> str:
        """The name of the task."""
        return models.describe(self.network).task

    def config(self) -> TrainingConfig:
        """Returns the settings of a run, which are those of the task."""
        return make_config(
            self.network,
            technique=self.technique,
            batch_size=self.batch_size,
            precision=self.precision,
            shard_params=self.shard_params,
        )


def make_config(
    network: str,
    *,
    technique: str = NONE,
    batch_size: int,
    precision: Precision = "float32",
    shard_params: bool = False,
) -> TrainingConfig:
    """Returns the settings of a run on `abstract_dataset`, which are those of its task.

    Args:
      network: the name of the network; in translation, of the generator.
      technique: the name of the technique, or `NONE`.
      batch_size: images in a step, over all devices.
      precision: precision of the computation.
      shard_params: whether large parameters are sharded over the devices.
    """
    entry = models.describe(network)
    large = entry.input_shape[0] >= 256
    networks: Mapping[str, Any] = (
        {
            "generator": network,
            "discriminator": "patchgan70" if large else "patchgan16",
        }
        if entry.task == "translation"
        else {"model": network}
    )
    config = TASKS[entry.task].config_type(
        data=DataConfig(dataset="shapes", loader="grain"),
        batch_size=batch_size,
        precision=precision,
        shard_params=shard_params,
        **networks,
    )
    techniques = () if technique == NONE else (technique,)
    optimizer = dataclasses.replace(config.optimizer, techniques=techniques)
    return dataclasses.replace(config, optimizer=optimizer)


def abstract_dataset(network: str) -> Dataset:
    """Returns a dataset without examples, of the images that a network is for."""
    entry = models.describe(network)
    reader = Reader(
        fields=_FIELDS[entry.task], size=entry.input_shape[:2], fit="stretch"
    )
    train = Split(
        name="train",
        records=(),
        reader=reader,
        cache=Path(),
        rows=range(_NUM_EXAMPLES),
    )
    num_classes = entry.published.get("num_classes", _NUM_CLASSES)
    return Dataset(
        name="shapes",
        task=entry.task,
        splits={"train": train},
        class_names=tuple(map(str, range(num_classes))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def make_plan(subject: Subject, devices: Sequence[jax.Device]) -> Plan:
    """Makes the training step, which neither compiles nor computes anything.

    Raises:
      UsageError: if the devices cannot share the batch.
    """
    config, dataset = subject.config(), abstract_dataset(subject.network)
    task = TASKS[subject.task].create(config, dataset)
    mesh = make_mesh(devices)
    loader = GrainLoader(dataset.split("train"), mesh)
    return Plan(task, config, train_loader=loader, mesh=mesh)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results. Bytes and FLOPs are those of one chip.

    Attributes:
      target: the name of the devices.
      chips: number of chips.
      task: the task.
      network: the network; in translation, the generator.
      batch_size: images in a step, over all chips.
      precision: precision of the computation.
      technique: the technique, or `NONE`.
      shard_params: whether large parameters are sharded over the chips.
      compile_seconds: time to lower and compile the step.
      argument_bytes: the state and the batch; None if the program does not fit.
      temporary_bytes: what the step needs besides; None if it does not fit.
      needed_bytes: all memory of the step; the state is reused and counts once.
      memory_bytes: the memory of a chip.
      gflop: billions of FLOPs as the compiler counts them; None on GPUs.
      gigabytes_accessed: memory traffic as the compiler counts it; None on GPUs.
      convolutions: convolutions of the program before it is compiled.
      fusions: see `benchmarks.hlo.Counts`, as for all fields below; None if the program
        does not fit.
      kernels: instructions that compute or move data.
      native_convolutions: convolutions by cuDNN, or in the matrix units of a TPU.
      other_convolutions: convolutions that cuDNN does not compute.
      bfloat16_convolutions: native convolutions of bfloat16 arrays.
      all_reduces: number of all-reduces.
      all_gathers: number of all-gathers.
      reduce_scatters: number of reduce-scatters.
      all_to_alls: number of all-to-alls.
      collective_permutes: number of collective-permutes.
      collective_bytes: bytes that a chip gives to or gets from collectives.
      compiler: the packages of the compiler.
    """

    target: str
    chips: int
    task: str
    network: str
    batch_size: int
    precision: str
    technique: str
    shard_params: bool
    compile_seconds: float
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    needed_bytes: int
    memory_bytes: int
    gflop: float | None = None
    gigabytes_accessed: float | None = None
    convolutions: int
    fusions: int | None = None
    kernels: int | None = None
    native_convolutions: int | None = None
    other_convolutions: int | None = None
    bfloat16_convolutions: int | None = None
    all_reduces: int | None = None
    all_gathers: int | None = None
    reduce_scatters: int | None = None
    all_to_alls: int | None = None
    collective_permutes: int | None = None
    collective_bytes: int | None = None
    compiler: str


def measure(subject: Subject) -> Measurement:
    """Compiles one training step.

    Raises:
      UsageError: if there is no such target, or it cannot share the batch.
    """
    target = find_target(subject.target)
    devices = target.devices()
    plan = make_plan(subject, devices)
    start = time.perf_counter()
    traced = plan.step.trace(plan.abstract_state, plan.abstract_feed)
    lowered = traced.lower(lowering_platforms=(target.compiler.platform,))
    found = _compile(lowered, target)
    return Measurement(
        target=target.name,
        chips=len(devices),
        task=subject.task,
        network=subject.network,
        batch_size=subject.batch_size,
        precision=subject.precision,
        technique=subject.technique,
        shard_params=subject.shard_params,
        compile_seconds=time.perf_counter() - start,
        convolutions=lowered.as_text().count("stablehlo.convolution"),
        memory_bytes=target.memory_bytes,
        compiler=target.compiler.versions,
        **found,
    )


def _compile(lowered: jax.stages.Lowered, target: Target) -> dict[str, Any]:
    """Returns what is known of the compiled program, by the name of the column."""
    try:
        compiled = lowered.compile(compiler_options=dict(target.compiler.options))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return {"needed_bytes": needed}
    memory: Any = compiled.memory_analysis()
    costs: Mapping[str, float] = compiled.cost_analysis() or {}
    counts = hlo.count(compiled.as_text() or "", platform=target.compiler.platform)
    collectives = {
        f"{kind.replace('-', '_')}s": number
        for kind, number in counts.collectives.items()
    }
    counted = dataclasses.asdict(counts)
    del counted["collectives"]
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "needed_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes,
        "gflop": _billions(costs.get("flops")),
        "gigabytes_accessed": _billions(costs.get("bytes accessed")),
        **counted,
        **collectives,
    }


def _billions(number: float | None) -> float | None:
    return None if number is None else number / 1e9


def needed_bytes(message: str) -> int | None:
    """Returns the bytes that a program needs, from an error of the TPU compiler.

    >>> needed_bytes("the total memory required for HLO temporaries (29.00G) exceeds "
    ...              "available HBM (15.75G).") / 2**30
    29.0
    """
    for pattern in _NEEDED:
        if match := re.search(pattern, message):
            return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])
    return None


@settings
class CompileConfig:
    """Compile whole training steps for devices that need not be there."""

    target: Annotated[tuple[str, ...], Separated(str)] = ("h100",)
    """Devices: h100 or h100:N for N of them, and TPUs by generation and topology, such
    as v5e:1x1, v5e:2x2, v5e:16x16, v5p:2x2x1 or v6e:4x4."""
    task: Literal["all", "classification", "segmentation", "translation"] = "all"
    """Task whose networks are compiled."""
    networks: Annotated[tuple[str, ...], Separated(str)] = _SMALL
    """Names of networks, or shell patterns for them; in translation, of generators."""
    techniques: Annotated[tuple[str, ...], NameList("technique", _TECHNIQUES)] = tuple(
        _TECHNIQUES
    )
    """Techniques, each by itself; none is the optimizer of the task alone."""
    batch_size: Positive[int] = 128
    """Images in a step, over all chips."""
    precision: Precision = "float32"
    """Precision of the computation; parameters and optimizer states stay float32."""
    shard_params: bool = False
    """Shard large parameters and optimizer states over the chips."""

    def __post_init__(self) -> None:
        for name in self.target:
            find_target(name)
        if not self.subjects:
            raise UsageError(
                f"no network for {self.task} is named {' or '.join(self.networks)}; "
                f"known: {', '.join(_trainable(self.task))}"
            )

    @property
    def subjects(self) -> list[Subject]:
        """What is compiled, in the order of targets, networks and techniques."""
        chosen = {n for pattern in self.networks for n in models.names(pattern)}
        networks = [name for name in _trainable(self.task) if name in chosen]
        return [
            Subject(
                target=target,
                network=network,
                technique=technique,
                batch_size=self.batch_size,
                precision=self.precision,
                shard_params=self.shard_params,
            )
            for target, network, technique in itertools.product(
                self.target, networks, self.techniques
            )
        ]


def _trainable(task: str) -> list[str]:
    """Returns the networks of a task; discriminators train beside a generator."""
    return [
        name
        for name in models.names()
        if task in ("all", models.describe(name).task) and "gan" not in name
    ]


def compile(  # as the command is called
    config: Annotated[CompileConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Compile whole training steps for devices that need not be there.

    Args:
      config: what to compile.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same results, only what is missing is compiled.
    """
    for name in config.target:
        find_target(name).compiler.load()
    described = dataclasses.asdict(config)
    with open_report("compile", described, run_dir, resume=True) as report:
        folder = report.folder
        done = {_identity(row) for row in folder.read(ROWS)}
        missing = [
            subject
            for subject in config.subjects
            if _identity(dataclasses.asdict(subject)) not in done
        ]
        folder.start()
        with shown_on(report.console)("compiling", len(missing)) as reporter:
            for subject in missing:
                reporter.describe(
                    f"{subject.network} for {subject.target}, {subject.technique}"
                )
                measurement = measure(subject)
                folder.append(ROWS, dataclasses.asdict(measurement) | environment())
                jax.clear_caches()
                reporter.advance()
        rows = folder.read(ROWS)
        report.save_rows(rows)
        for target in dict.fromkeys(row["target"] for row in rows):
            found = [row for row in rows if row["target"] == target]
            title = f"{target}, batches of {config.batch_size}, {config.precision}"
            report.show(HEADER, list(map(cells, found)), title)
        for row in rows:
            if problem := misfit(row):
                report.console.print(problem)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field.name] for field in dataclasses.fields(Subject))


def misfit(row: Row) -> str:
    """Returns a line that says what a program needs that does not fit; "" if it fits.

    >>> misfit({"needed_bytes": 20e9, "memory_bytes": 16e9, "network": "vgg16_bn",
    ...         "technique": "sam", "target": "v5e:1x1", "batch_size": 512})
    'vgg16_bn with sam does not fit v5e:1x1: it needs 20.0 GB per chip of 16.0 GB at ...
    """
    needed, there = row["needed_bytes"], row["memory_bytes"]
    if needed <= there:
        return ""
    return (
        f"{row['network']} with {row['technique']} does not fit {row['target']}: it "
        f"needs {needed / 1e9:.1f} GB per chip of {there / 1e9:.1f} GB at a batch size "
        f"of {row['batch_size']}: take a smaller batch or more chips"
    )


HEADER = ("network", "technique", "s", "GB", "kernels", "conv.", "collectives")


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row of a table under `HEADER`.

    Memory is all that the step needs on one chip. Fusions are followed by all kernels,
    native convolutions by all others, and collectives by their megabytes.
    """
    memory = f"{row['needed_bytes'] / 1e9:.2f}"
    start = (row["network"], row["technique"], f"{row['compile_seconds']:.0f}")
    if row["fusions"] is None:
        return (*start, f"{memory}!", "", "", "")
    collectives = sum(row[f"{kind.replace('-', '_')}s"] for kind in hlo.COLLECTIVES)
    return (
        *start,
        memory,
        f"{row['fusions']}/{row['kernels']}",
        f"{row['native_convolutions']}/{row['other_convolutions']}",
        f"{collectives}/{row['collective_bytes'] / 1e6:.1f}",
    )
