"""What each network costs: parameters, FLOPs, compilation, time and memory.

FLOPs of a forward are XLA's own count, before it optimises, beside the multiply-adds
that were published for the same form; a multiply-add is two FLOPs. A training step is
the forward, the gradient and SGD with momentum, as one compiled function that reuses
the memory of its state.
"""

import csv
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.table import Table

import models
from benchmarks.timing import interleave
from optax_tricks.nnx import batch_gradients, split
from train.errors import UsageError
from train.output.run_folder import environment, open_run_folder
from train.progress import make_console, shown_on

Tree = Any
Row = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]

_ROWS = "rows.jsonl"

# Billions of multiply-adds of a forward on one image, as torchvision documents them
# with its weights (https://docs.pytorch.org/vision/stable/models.html, "GFLOPS"). It
# counts convolutions and matrix products alone.
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

# Multiplications and additions per second of dense matrices in bfloat16, by the data
# sheets, for the kinds of device that jax names so.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results.

    Times are medians over the rounds with their 10 % and 90 % quantiles.

    Attributes:
      network: its name in the catalogue.
      dtype: of the computation; parameters are float32.
      batch_size: images in a forward or step.
      input_shape: (height, width, channels) of an image.
      parameters: that are trained.
      forward_gflop: of one image, by XLA.
      published_gflop: of one image, where they are documented.
      forward_compile_seconds: from tracing to the compiled forward.
      step_compile_seconds: from tracing to the compiled training step.
      forward_seconds: of a batch, in evaluation.
      forward_seconds_low: its 10 % quantile.
      forward_seconds_high: its 90 % quantile.
      step_seconds: of a training step.
      step_seconds_low: its 10 % quantile.
      step_seconds_high: its 90 % quantile.
      forward_bytes: arguments, results and temporaries of the compiled forward.
      step_bytes: the same of the training step, what it reuses counted once.
      device_peak_bytes: most memory that the device had in use until now, where it
        counts that and this network is what raised it.
      share_of_peak: FLOPs of a step by XLA, per second, in those of the device; of
        bfloat16 on devices in `PEAK_FLOPS`.
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
    """A compiled function, with what XLA says of it."""

    run: Callable[..., Tree]
    compile_seconds: float
    flop: float
    bytes: int


def _compile(function: Callable[..., Tree], *shapes: Tree, **options) -> _Program:
    start = time.perf_counter()
    lowered = jax.jit(function, **options).lower(*shapes)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return _Program(
        run=compiled,
        compile_seconds=seconds,
        flop=lowered.cost_analysis()["flops"],
        bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def _values(shapes: Tree) -> Tree:
    """Arrays of such shapes, made without the compilation that initializers need.

    Kernels are small random numbers, as a GPU is faster on constants; vectors, which
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
    """Of the first class, for every image or pixel."""
    return -jax.nn.log_softmax(model(images))[..., 0].mean(), None


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

    def forward(params: Tree, model_state: Tree, images: jax.Array) -> jax.Array:
        model = nnx.view(
            nnx.merge(graphdef, params, model_state),
            use_running_average=True,
            deterministic=True,
            raise_if_not_found=False,
        )
        return model(images)

    def step(state: Tree, images: jax.Array) -> Tree:
        params, model_state, opt_state = state
        out = batch_gradients(loss, graphdef, params, model_state, images)
        updates, opt_state = sgd.update(out.grads, opt_state, params)
        return optax.apply_updates(params, updates), out.model_state, opt_state

    images = jax.ShapeDtypeStruct((batch_size, *entry.input_shape), jnp.float32)
    forward = _compile(forward, *variables, images)
    state = (*variables, jax.eval_shape(sgd.init, variables[0]))
    step = _compile(step, state, images, donate_argnums=0)

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
    """Most bytes in use since this process began, if the device counts them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _share_of_peak(dtype: Dtype, flops: float) -> float | None:
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return flops / peak if peak and dtype == "bfloat16" else None


def networks(
    names: tuple[str, ...] = ("*",),
    batch_size: int = 2,
    rounds: int = 5,
    dtype: Dtype | None = None,
    run_dir: Path | None = None,
) -> None:
    """Compile and time each network, and say how large it is.

    Args:
      names: of the networks, or shell patterns for them.
      batch_size: images in a forward or training step.
      rounds: how often each is timed.
      dtype: of the computation; if unset float32, and on a GPU bfloat16 as well.
      run_dir: folder for the results; a new one under runs/ if unset. One that holds a
        part of the same is finished, and nothing in it is measured again.
    """
    if rounds < 1 or batch_size < 1:
        raise UsageError(
            f"rounds and batch size must be at least 1, got {rounds} and {batch_size}"
        )
    for pattern in names:
        if not models.names(pattern):
            known = ", ".join(models.names())
            raise UsageError(f"no network is named {pattern!r}; known: {known}")
    chosen = [n for n in models.names() if any(n in models.names(p) for p in names)]
    both = jax.default_backend() == "gpu"
    dtypes = [dtype] if dtype else ["float32", *["bfloat16"] * both]
    console = make_console()
    config = {
        "networks": chosen,
        "batch_size": batch_size,
        "rounds": rounds,
        "dtypes": dtypes,
    }
    with open_run_folder(run_dir, "networks", config, resume=True) as folder:
        done = {(row["network"], row["dtype"]) for row in folder.read(_ROWS)}
        wanted = [(name, dtype) for name in chosen for dtype in dtypes]
        missing = [job for job in wanted if job not in done]
        folder.start()
        with shown_on(console)("measuring", len(missing)) as reporter:
            for name, dtype in missing:
                reporter.describe(f"{name}, {dtype}")
                measurement = measure(name, dtype, batch_size, rounds)
                folder.append(_ROWS, dataclasses.asdict(measurement) | environment())
                jax.clear_caches()
                reporter.advance()
        rows = folder.read(_ROWS)
        _write(folder.path / "rows.csv", rows)
        for dtype in dtypes:
            found = [row for row in rows if row["dtype"] == dtype]
            console.print(
                _table(f"{dtype}, batches of {batch_size}", found), soft_wrap=False
            )
        console.print(f"Written to {folder.path}")


HEADER = ("network", "params", "GFLOP", "compile s", "fwd ms", "step ms", "GB")


def cells(row: Row) -> tuple[str, ...]:
    """What a table under `HEADER` says of a row, and the share of the peak, if any.

    FLOPs stand before the published ones, compilation of the forward before that of
    the step, and the step's time before its quantiles in units of itself.
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


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shares = any(row["share_of_peak"] is not None for row in rows)
    for name in (*HEADER, *["peak"] * shares):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
