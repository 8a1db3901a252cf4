"""Whether the numbers of a device are right, before anything on it is timed.

Sums, matrix products and convolutions are compared with float64 on the CPU. Updates of
the techniques and training steps are compared with the same program on the CPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_tricks
from benchmarks.steps import make_step
from train.optim.techniques import TECHNIQUES, TechniqueOptions

Tree: TypeAlias = Any

# The largest relative errors that are allowed, by the precision of products. A product
# of TensorFloat-32 numbers has 10 bits, and one of bfloat16 numbers 7.
_TOLERANCES = {"float32": 5e-5, "tf32": 3e-3, "bfloat16": 2e-2}
_SUM_TOLERANCE = 5e-6

# A deep network amplifies rounding errors. TF32 would still be noticed.
_STEP_TOLERANCE = 1e-3

_FLOAT64 = "float64 on the CPU"

# For each task, a network that is compiled soon.
NETWORKS = ("resnet20", "unet_small", "unet64_small")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One row of the results.

    Attributes:
      name: what is computed.
      precision: precision of products: float32, bfloat16, or tf32, which is what JAX
        chooses for float32 arrays if it is told nothing.
      reference: what it is compared with.
      error: norm of the difference, relative to the norm of the reference; the largest
        of its parts, such as a result and each gradient.
      tolerance: the largest error that is allowed.
      passed: whether the error is that small; NaN is not.
    """

    name: str
    precision: str
    reference: str
    error: float
    tolerance: float
    passed: bool

    def __str__(self) -> str:
        verdict = "right" if self.passed else "WRONG"
        return (
            f"{verdict}: {self.name}, {self.precision}, is {self.error:.1e} off "
            f"({self.reference}), where {self.tolerance:.0e} is allowed"
        )


def check_numbers(*, small: bool = False) -> Iterator[Check]:
    """Compares numbers of the default device with those of the CPU.

    Args:
      small: whether to do so with small arrays.
    """
    yield from _check_operations(8 if small else 64)
    yield from _check_techniques(8 if small else 256)
    for network in NETWORKS:
        yield _check_step(network, batch_size=2 if small else 16)


def _check(
    name: str,
    precision: str,
    found: Sequence[Tree],
    expected: Sequence[Tree],
    tolerance: float,
    to: str,
) -> Check:
    """Compares parts with each other, so that no large one hides a small one."""
    error = float(np.max(list(map(relative_error, found, expected))))
    return Check(
        name=name,
        precision=precision,
        reference=to,
        error=error,
        tolerance=tolerance,
        passed=error <= tolerance,
    )


def relative_error(found: Tree, expected: Tree) -> float:
    """Returns the norm of the difference of two trees, relative to the second.

    Integers, Booleans and keys are left out.

    >>> import jax.numpy as jnp
    >>> relative_error({"a": jnp.array([3.0, 4.5])}, {"a": jnp.array([3.0, 4.0])})
    0.1
    """

    def flat(tree: Tree) -> np.ndarray:
        leaves = [
            np.asarray(x).astype(np.float64).ravel()
            for x in jax.tree.leaves(tree)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return np.concatenate([np.zeros(0), *leaves])

    wanted = flat(expected)
    difference = np.linalg.norm(flat(found) - wanted)
    return float(difference / max(np.linalg.norm(wanted), np.finfo(float).tiny))


def _on_cpu(function: Callable[..., Tree], *arguments: Tree) -> Tree:
    """Returns what a jitted function computes on the CPU, compiled in less time."""
    run = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(run(*jax.device_put(arguments, jax.devices("cpu")[0])))


######## Operations against float64 ###################################################


def _check_operations(channels: int) -> Iterator[Check]:
    arrays = _operands(channels)
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        sums, products = _on_cpu(_sums, wide), _on_cpu(_products, wide)
    narrow = jax.tree.map(jnp.asarray, arrays)
    found = jax.device_get(jax.jit(_sums)(narrow))
    for name, expected in sums.items():
        yield _check(name, "float32", found[name], expected, _SUM_TOLERANCE, _FLOAT64)
    for precision, tolerance in _TOLERANCES.items():
        # A jitted function is compiled once for each precision.
        with jax.default_matmul_precision(
            "highest" if precision == "float32" else "default"
        ):
            dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
            operands = {name: x.astype(dtype) for name, x in narrow.items()}
            found = jax.device_get(jax.jit(_products)(operands))
        for name, expected in products.items():
            yield _check(name, precision, found[name], expected, tolerance, _FLOAT64)


def _operands(channels: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    return {
        "images": normal(8, 32, 32, channels),
        "kernel": normal(3, 3, channels, channels),
        "large": normal(4, 4, channels, channels),
        "point": normal(1, 1, channels, 2 * channels),
        "grouped": normal(3, 3, channels // 4, channels),
        "depthwise": normal(3, 3, 1, channels),
        "left": normal(16 * channels, 8 * channels),
        "right": normal(8 * channels, 4 * channels),
    }


def _sums(x: Mapping[str, jax.Array]) -> dict[str, tuple[Tree, ...]]:
    """Returns what is summed: over all numbers, rows, columns and trees."""
    images = x["images"] + 3
    norms = optax_tricks.global_norms({"a": x["left"], "b": [x["right"]]})
    return {
        "sum": (images.sum(),),
        "mean and variance of channels": (
            images.mean(axis=(0, 1, 2)),
            images.var(axis=(0, 1, 2)),
        ),
        "log-softmax": (jax.nn.log_softmax(x["left"]),),
        "norm of a tree": norms,
        "maximum and its gradient": _with_gradients(_max_pool, x["images"]),
    }


def _max_pool(x: jax.Array) -> jax.Array:
    window = (1, 3, 3, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "SAME")


def _products(x: Mapping[str, jax.Array]) -> dict[str, tuple[Tree, ...]]:
    """Returns a matrix product and convolutions, each with its gradients."""

    def conv(name: str, **options: Any) -> tuple[Tree, ...]:
        function = functools.partial(
            jax.lax.conv_general_dilated,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **{"window_strides": (1, 1), "padding": "SAME"} | options,
        )
        return _with_gradients(function, x["images"], x[name])

    channels = x["images"].shape[-1]
    return {
        "matrix product": _with_gradients(jnp.matmul, x["left"], x["right"]),
        "convolution 3x3": conv("kernel"),
        "convolution 3x3, stride 2": conv("kernel", window_strides=(2, 2)),
        "convolution 3x3, dilation 2": conv("kernel", rhs_dilation=(2, 2)),
        "convolution 4x4, stride 2": conv("large", window_strides=(2, 2)),
        "convolution 4x4, transposed": conv(
            "large", lhs_dilation=(2, 2), padding=((2, 2), (2, 2))
        ),
        "convolution 1x1": conv("point"),
        "convolution 3x3, 4 groups": conv("grouped", feature_group_count=4),
        "convolution 3x3, depthwise": conv("depthwise", feature_group_count=channels),
    }


def _with_gradients(
    function: Callable[..., jax.Array], *operands: jax.Array
) -> tuple[Tree, ...]:
    """Returns a result, and the gradients of half the sum of its squares."""
    result, vjp = jax.vjp(function, *operands)
    return result, *vjp(result)


######## Techniques and training steps against the CPU ################################


def _check_techniques(width: int) -> Iterator[Check]:
    """Compares two updates of each technique, and its state."""
    params = _params(width)
    found = jax.device_get(jax.jit(_update_twice)(params))
    expected = _on_cpu(_update_twice, params)
    for name in TECHNIQUES:
        yield _check(
            f"updates of {name}",
            "float32",
            found[name],
            expected[name],
            _TOLERANCES["float32"],
            "CPU",
        )


def _params(width: int) -> Tree:
    """Returns random parameters of a convolution and a linear layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, width, width))},
        "linear": {
            "kernel": jax.random.normal(keys[1], (8 * width, 1000)),
            "bias": jax.random.normal(keys[2], (1000,)),
        },
    }


def _update_twice(params: Tree) -> dict[str, tuple[Tree, Tree]]:
    """Returns the updates and the state after two steps of each technique."""

    def grad_fn(params: Tree, step: Any) -> Tree:
        return jax.tree.map(lambda w: jnp.sin(2 * w) + 0.1 * w, params)

    found = {}
    for name, technique in TECHNIQUES.items():
        transform = technique.build(
            TechniqueOptions(), optax.constant_schedule(0.1), jax.random.key(1)
        )
        point, state = params, transform.init(params)
        for step in range(2):
            updates, state = transform.update(
                grad_fn(point, step), state, point, grad_fn=grad_fn
            )
            point = optax.apply_updates(point, optax.tree.scale(-0.1, updates))
        found[name] = updates, state
    return found


def _check_step(network: str, batch_size: int) -> Check:
    """Compares the gradients and the other state after a training step.

    The first step of momentum and of Adam leaves the gradient in the optimizer state.
    The parameters are not compared: Adam divides each gradient by its size, so where a
    gradient is all but zero, its rounding error decides.
    """
    step, state, batch = make_step(network, batch_size=batch_size)

    def take(state: Tree, batch: Tree) -> Tree:
        after, metrics = step(state, batch)
        return after.opt_state, after.model_state, metrics.averaged

    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(take)(state, batch))
        expected = _on_cpu(take, state, batch)
    name = f"training step of {network}"
    return _check(name, "float32", found, expected, _STEP_TOLERANCE, "CPU")
