"""How large each network is: parameters, FLOPs and memory.

The FLOPs of a forward pass are as XLA counts them before it optimizes. They can be
compared with the multiply-adds that were published for the same form of the network; a
multiply-add is two FLOPs. A training step is the forward pass, the gradient and SGD
with momentum, in one compiled function that reuses the memory of its state.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import models
from benchmarks.report import ROWS, Row, open_report
from optax_tricks.nnx import batch_gradients, split
from train.errors import UsageError
from train.output.run_folder import environment
from train.progress import shown_on
from train.settings import Positive, Separated, settings

Tree: TypeAlias = Any

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results.

    Attributes:
      network: name of the network in the catalogue.
      batch_size: images in a forward pass or training step.
      input_shape: (height, width, channels) of an image.
      parameters: number of trained parameters.
      forward_gflop: billions of FLOPs for one image, as XLA counts them.
      published_gflop: the published number of the same; None if there is none.
      forward_bytes: arguments, results and temporaries of the compiled forward pass, in
        evaluation mode.
      step_bytes: the same for the training step; reused memory counts once.
    """

    network: str
    batch_size: int
    input_shape: str
    parameters: int
    forward_gflop: float
    published_gflop: float | None
    forward_bytes: int
    step_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A compiled function, with what XLA says about it."""

    run: Callable[..., Tree]
    compile_seconds: float
    flop: float
    bytes: int


def compile_function(
    function: Callable[..., Tree], *shapes: Tree, **options: Any
) -> Program:
    """Compiles a function for the default device.

    Args:
      function: the function.
      shapes: its arguments, or their shapes and dtypes.
      options: options of `jax.jit`.
    """
    start = time.perf_counter()
    traced = jax.jit(function, **options).trace(*shapes)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    # JAX counts on CPUs alone. There convolutions may be loops, of which only one
    # iteration would count, so this is the program for another platform.
    with jax.default_device(jax.devices("cpu")[0]):
        costs: Any = traced.lower(lowering_platforms=("tpu",)).cost_analysis()
    return Program(
        run=compiled,
        compile_seconds=seconds,
        flop=costs["flops"],
        bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def make_values(shapes: Tree) -> Tree:
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


def _network(
    name: str,
) -> tuple[nnx.GraphDef[models.Network], tuple[Tree, Tree]]:
    """Returns the definition of a network, and shapes of (params, model_state)."""
    options = models.describe(name).published
    model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    graphdef, *variables = split(model)
    return graphdef, (variables[0], variables[1])


def training_step(
    name: str, shape: tuple[int, ...]
) -> tuple[Program, Callable[[], Tree]]:
    """Compiles a training step of the published form of a network.

    Args:
      name: name of the network in the catalogue.
      shape: (batch, height, width, channels) of the images.

    Returns:
      The program, and a function that takes a step and returns the new state.
    """
    graphdef, variables = _network(name)
    is_translator = models.describe(name).task == "translation"
    loss = _mean_square if is_translator else _cross_entropy
    sgd = optax.sgd(0.01, momentum=0.9)

    def train_step(state: Tree, images: jax.Array) -> Tree:
        params, model_state, opt_state = state
        out = batch_gradients(loss, graphdef, params, model_state, images)
        updates, opt_state = sgd.update(out.grads, opt_state, params)
        return optax.apply_updates(params, updates), out.model_state, opt_state

    shapes = (*variables, jax.eval_shape(sgd.init, variables[0]))
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = compile_function(train_step, shapes, images, donate_argnums=0)
    state, images = make_values((shapes, images))

    def train() -> Tree:
        nonlocal state
        state = program.run(state, images)
        return state

    return program, train


def measure(name: str, batch_size: int) -> Measurement:
    """Compiles the published form of one network."""
    entry = models.describe(name)
    graphdef, variables = _network(name)

    def predict(params: Tree, model_state: Tree, images: jax.Array) -> jax.Array:
        model = nnx.view(
            nnx.merge(graphdef, params, model_state),
            use_running_average=True,
            deterministic=True,
            raise_if_not_found=False,
        )
        logits: jax.Array = model(images)
        return logits

    images = jax.ShapeDtypeStruct((batch_size, *entry.input_shape), jnp.float32)
    forward = compile_function(predict, *variables, images)
    step, _ = training_step(name, images.shape)
    multiply_adds = PUBLISHED_MULTIPLY_ADDS.get(name)
    return Measurement(
        network=name,
        batch_size=batch_size,
        input_shape="x".join(map(str, entry.input_shape)),
        parameters=sum(x.size for x in jax.tree.leaves(variables[0])),
        forward_gflop=forward.flop / batch_size / 1e9,
        published_gflop=multiply_adds and 2 * multiply_adds,
        forward_bytes=forward.bytes,
        step_bytes=step.bytes,
    )


@settings
class NetworksConfig:
    """Compile each network, and report its size."""

    names: Annotated[tuple[str, ...], Separated(str)] = ("*",)
    """Names of networks, or shell patterns for them."""
    batch_size: Positive[int] = 2
    """Images in a forward pass or training step."""

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


def networks(
    config: Annotated[NetworksConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Compile each network, and report its size.

    Args:
      config: what to compile.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same results, only what is missing is compiled.
    """
    described = {"networks": config.networks, "batch_size": config.batch_size}
    with open_report("networks", described, run_dir, resume=True) as report:
        folder = report.folder
        done = {row["network"] for row in folder.read(ROWS)}
        missing = [name for name in config.networks if name not in done]
        folder.start()
        with shown_on(report.console)("compiling", len(missing)) as reporter:
            for name in missing:
                reporter.describe(name)
                measurement = measure(name, config.batch_size)
                folder.append(ROWS, dataclasses.asdict(measurement) | environment())
                jax.clear_caches()
                reporter.advance()
        rows = folder.read(ROWS)
        report.save_rows(rows)
        title = f"float32, batches of {config.batch_size}"
        report.show(HEADER, list(map(cells, rows)), title)


HEADER = ("network", "params", "GFLOP", "forward GB", "step GB")


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row of a table under `HEADER`.

    Our FLOPs are followed by the published ones.
    """
    published = row["published_gflop"]
    return (
        row["network"],
        f"{row['parameters'] / 1e6:.1f}M",
        f"{row['forward_gflop']:.2f}" + (f"/{published:.2f}" if published else ""),
        f"{row['forward_bytes'] / 1e9:.2f}",
        f"{row['step_bytes'] / 1e9:.2f}",
    )
