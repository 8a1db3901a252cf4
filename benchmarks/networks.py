"""What each network costs: parameters, FLOPs, compilation, time and memory.

The FLOPs of a forward pass are as XLA counts them before it optimizes. They can be
compared with the multiply-adds that were published for the same form of the network; a
multiply-add is two FLOPs. A training step is the forward pass, the gradient and SGD
with momentum, in one compiled function that reuses the memory of its state.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import models
from benchmarks.report import ROWS, Row, open_report
from benchmarks.timing import interleave
from optax_tricks.nnx import batch_gradients, split
from train.errors import UsageError
from train.output.run_folder import environment
from train.progress import shown_on
from train.settings import Positive, settings

Tree: TypeAlias = Any
Dtype: TypeAlias = Literal["float32", "bfloat16"]

# Billions of multiply-adds of a forward pass on one image, as torchvision documents
# them with its weights (https://docs.pytorch.org/vision/stable/models.html, "GFLOPS").
# It counts convolutions and matrix products alone.
PUBLISHED_MULTIPLY_ADDS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnext50_32x4d": 4.23,
    "vgg11_bn": 7.609,
    "vgg16_bn": 15.47,
    "densenet121": 2.834,
    "mobilenet_v2": 0.301,
    "vit_b_16": 17.564,
}

# Operations per second on dense matrices in bfloat16, from the data sheets, by the name
# that JAX has for the kind of device.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results.

    Times are medians over the rounds, with their 10 % and 90 % quantiles.

    Attributes:
      network: name of the network in the catalogue.
      dtype: dtype of the computation; parameters are float32.
      batch_size: images in a forward pass or training step.
      input_shape: (height, width, channels) of an image.
      parameters: number of trained parameters.
      forward_gflop: billions of FLOPs for one image, as XLA counts them.
      published_gflop: the published number of the same; None if there is none.
      forward_compile_seconds: time to trace and compile the forward pass.
      step_compile_seconds: time to trace and compile the training step.
      forward_seconds: time of the forward pass of a batch, in evaluation mode.
      forward_seconds_low: its 10 % quantile.
      forward_seconds_high: its 90 % quantile.
      step_seconds: time of a training step.
      step_seconds_low: its 10 % quantile.
      step_seconds_high: its 90 % quantile.
      forward_bytes: arguments, results and temporaries of the compiled forward pass.
      step_bytes: the same for the training step; reused memory counts once.
      device_peak_bytes: the most memory that the device has had in use so far; None if
        the device does not count it, or an earlier network needed more.
      share_of_peak: FLOPs per second of a step as a share of what the device can do;
        only for bfloat16 on devices in `PEAK_FLOPS`.
    """

    network: str
    dtype: Dtype
    batch_size: int
    input_shape: str
    parameters: int
    forward_gflop: float
    published_gflop: float | None
    forward_compile_seconds: float
    step_compile_seconds: float
    forward_seconds: float
    forward_seconds_low: float
    forward_seconds_high: float
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    forward_bytes: int
    step_bytes: int
    device_peak_bytes: int | None
    share_of_peak: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Program:
    """A compiled function, with what XLA says about it."""

    run: Callable[..., Tree]
    compile_seconds: float
    flop: float
    bytes: int


def _compile(function: Callable[..., Tree], *shapes: Tree, **options: Any) -> _Program:
    start = time.perf_counter()
    lowered = jax.jit(function, **options).lower(*shapes)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    costs: Any = lowered.cost_analysis()
    return _Program(
        run=compiled,
        compile_seconds=seconds,
        flop=costs["flops"],
        bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def _values(shapes: Tree) -> Tree:
    """Makes arrays of such shapes, without the compilation that initializers need.

    Kernels are small random numbers, as a GPU is faster on constants. Vectors, which
    are scales, biases and statistics, are ones.
    """
    random = np.random.default_rng(0)

    def value(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        if len(x.shape) < 2:
            return jnp.ones(x.shape, x.dtype)
        return jnp.asarray(0.02 * random.standard_normal(x.shape, np.float32))

    return jax.tree.map(value, shapes)


def _cross_entropy(model: nnx.Module, images: jax.Array) -> tuple[jax.Array, None]:
    """Returns the loss if every image or pixel is of the first class."""
    logits: jax.Array = model(images)
    return -jax.nn.log_softmax(logits)[..., 0].mean(), None


def _mean_square(model: nnx.Module, images: jax.Array) -> tuple[jax.Array, None]:
    return jnp.square(model(images)).mean(), None


def measure(name: str, dtype: Dtype, batch_size: int, rounds: int) -> Measurement:
    """Compiles and times the published form of one network."""
    entry = models.describe(name)
    options = {**entry.published, "dtype": jnp.dtype(dtype)}
    model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    graphdef, *variables = split(model)
    loss = _cross_entropy if entry.task != "translation" else _mean_square
    sgd = optax.sgd(0.01, momentum=0.9)

    def predict(params: Tree, model_state: Tree, images: jax.Array) -> jax.Array:
        model = nnx.view(
            nnx.merge(graphdef, params, model_state),
            use_running_average=True,
            deterministic=True,
            raise_if_not_found=False,
        )
        logits: jax.Array = model(images)
        return logits

    def train_step(state: Tree, images: jax.Array) -> Tree:
        params, model_state, opt_state = state
        out = batch_gradients(loss, graphdef, params, model_state, images)
        updates, opt_state = sgd.update(out.grads, opt_state, params)
        return optax.apply_updates(params, updates), out.model_state, opt_state

    images = jax.ShapeDtypeStruct((batch_size, *entry.input_shape), jnp.float32)
    forward = _compile(predict, *variables, images)
    state = (*variables, jax.eval_shape(sgd.init, variables[0]))
    step = _compile(train_step, state, images, donate_argnums=0)

    peak_before = _device_peak()
    variables, state, images = _values((variables, state, images))

    def train() -> Tree:
        nonlocal state
        state = step.run(state, images)
        return state

    calls = {"forward": lambda: forward.run(*variables, images), "step": train}
    seconds = interleave(calls, rounds)
    times = {
        f"{part}_seconds{end}": float(np.quantile(seconds[part], quantile))
        for part in calls
        for end, quantile in (("", 0.5), ("_low", 0.1), ("_high", 0.9))
    }
    peak = _device_peak()
    multiply_adds = PUBLISHED_MULTIPLY_ADDS.get(name)
    return Measurement(
        network=name,
        dtype=dtype,
        batch_size=batch_size,
        input_shape="x".join(map(str, entry.input_shape)),
        parameters=sum(x.size for x in jax.tree.leaves(variables[0])),
        forward_gflop=forward.flop / batch_size / 1e9,
        published_gflop=multiply_adds and 2 * multiply_adds,
        forward_compile_seconds=forward.compile_seconds,
        step_compile_seconds=step.compile_seconds,
        **times,
        forward_bytes=forward.bytes,
        step_bytes=step.bytes,
        device_peak_bytes=peak if peak != peak_before else None,
        share_of_peak=_share_of_peak(dtype, step.flop / times["step_seconds"]),
    )


def _device_peak() -> int | None:
    """Returns the most bytes in use since this process began, if they are counted."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _share_of_peak(dtype: Dtype, flops: float) -> float | None:
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return flops / peak if peak and dtype == "bfloat16" else None


@settings
class NetworksConfig:
    """Compile and time each network, and report its size."""

    names: tuple[str, ...] = ("*",)
    """Names of networks, or shell patterns for them."""
    batch_size: Positive[int] = 2
    """Images in a forward pass or training step."""
    rounds: Positive[int] = 5
    """Number of rounds; each network is timed once in a round."""
    dtype: Dtype | None = None
    """Dtype of the computation; float32 if unset, and on a GPU bfloat16 as well."""

    def __post_init__(self) -> None:
        for pattern in self.names:
            if not models.names(pattern):
                known = ", ".join(models.names())
                raise UsageError(f"no network is named {pattern!r}; known: {known}")

    @property
    def networks(self) -> list[str]:
        """The names of the networks, in the order of the catalogue."""
        chosen = {name for pattern in self.names for name in models.names(pattern)}
        return [name for name in models.names() if name in chosen]

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The dtypes, on the device that is there."""
        if self.dtype is not None:
            return (self.dtype,)
        if jax.default_backend() == "gpu":
            return ("float32", "bfloat16")
        return ("float32",)


def networks(
    config: Annotated[NetworksConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Compile and time each network, and report its size.

    Args:
      config: what to time.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same results, only what is missing is measured.
    """
    described = {
        "networks": config.networks,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "dtypes": config.dtypes,
    }
    with open_report("networks", described, run_dir, resume=True) as report:
        folder = report.folder
        done = {(row["network"], row["dtype"]) for row in folder.read(ROWS)}
        jobs = [(name, dtype) for name in config.networks for dtype in config.dtypes]
        missing = [job for job in jobs if job not in done]
        folder.start()
        with shown_on(report.console)("measuring", len(missing)) as reporter:
            for name, dtype in missing:
                reporter.describe(f"{name}, {dtype}")
                measurement = measure(name, dtype, config.batch_size, config.rounds)
                folder.append(ROWS, dataclasses.asdict(measurement) | environment())
                jax.clear_caches()
                reporter.advance()
        rows = folder.read(ROWS)
        report.save_rows(rows)
        for dtype in config.dtypes:
            found = [row for row in rows if row["dtype"] == dtype]
            title = f"{dtype}, batches of {config.batch_size}"
            report.show(header_of(found), list(map(cells, found)), title)


HEADER = ("network", "params", "GFLOP", "compile s", "fwd ms", "step ms", "GB")


def header_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns `HEADER`, with a column for the share of the peak if a row has one."""
    if any(row["share_of_peak"] is not None for row in rows):
        return (*HEADER, "peak")
    return HEADER


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row of a table under `HEADER`, with the share of the peak if known.

    Our FLOPs are followed by the published ones, and the compilation time of the
    forward pass by the compilation time of the step. The quantiles of the step are
    relative to its median.
    """
    published, share = row["published_gflop"], row["share_of_peak"]
    step, low, high = (row[f"step_seconds{end}"] for end in ("", "_low", "_high"))
    return (
        row["network"],
        f"{row['parameters'] / 1e6:.1f}M",
        f"{row['forward_gflop']:.2f}" + (f"/{published:.2f}" if published else ""),
        f"{row['forward_compile_seconds']:.0f}, {row['step_compile_seconds']:.0f}",
        f"{1000 * row['forward_seconds']:.0f}",
        f"{1000 * step:.0f} [{low / step:.2f}, {high / step:.2f}]",
        f"{row['step_bytes'] / 1e9:.2f}",
        *([f"{share:.0%}"] if share is not None else []),
    )
