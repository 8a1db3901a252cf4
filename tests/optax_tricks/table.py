"""One table of all transforms, and helpers, for the tests of what they have in common.

A row has a factory, its arguments, and the extra arguments that its update needs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks

LR = 0.1


def loss(params: Any) -> jax.Array:
    """A loss of curvature 0.5 + cos w, which has either sign."""
    terms = [jnp.sum(0.25 * (w - 1) ** 2 - jnp.cos(w)) for w in jax.tree.leaves(params)]
    return sum(terms, start=jnp.zeros(()))


def grad_fn(params: Any, step: int) -> Any:
    """The gradient of `loss`, written by hand because it runs hundreds of times."""
    del step
    return jax.tree.map(lambda w: 0.5 * (w - 1) + jnp.sin(w), params)


def first_axis(grads: Any) -> Any:
    return jax.tree.map(lambda g: (0,) if jnp.ndim(g) > 1 else (), grads)


class Row(NamedTuple):
    """A public factory and one way to call it."""

    id: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    extra: Mapping[str, Any] = MappingProxyType({})

    def build(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.kwargs, **changes})

    def optimizer(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Returns a chain whose updates descend."""
        tx = self.build(**changes)
        return tx if self.factory in OPTIMIZERS else optax.chain(tx, optax.sgd(LR))


OPTIMIZERS = (optax_tricks.pugd, optax_tricks.step_tuned_sgd)
TWO = {"grad_fn": grad_fn}
COSINE = optax.cosine_decay_schedule(LR, 50)
ROWS = [
    Row("random", optax_tricks.scale_by_random, {"key": 3}),
    Row(
        "random-key",
        optax_tricks.scale_by_random,
        {"key": jax.random.key(3), "minval": 0.5},
    ),
    Row("random-half", optax_tricks.scale_by_random, {"key": 3, "probability": 0.5}),
    Row("centralize", optax_tricks.centralize),
    Row("centralize-conv", optax_tricks.centralize, {"conv_only": True}),
    Row("centralize-tuple", optax_tricks.centralize, {"reduction_axes": (0,)}),
    Row("centralize-callable", optax_tricks.centralize, {"reduction_axes": first_axis}),
    Row("bb", optax_tricks.barzilai_borwein_step, {"learning_rate": LR}, TWO),
    Row(
        "bb-schedule",
        optax_tricks.barzilai_borwein_step,
        {"learning_rate": COSINE},
        TWO,
    ),
    Row("unit", optax_tricks.perturbed_unit_step, {}, TWO),
    Row("step-tuned", optax_tricks.step_tuned_sgd, {"learning_rate": LR}, TWO),
    Row("pugd", optax_tricks.pugd, {"learning_rate": LR, "weight_decay": 0.02}, TWO),
    Row(
        "pugd-schedule",
        optax_tricks.pugd,
        {"learning_rate": COSINE, "momentum": 0},
        TWO,
    ),
]
SINGLE = [row for row in ROWS if not row.extra]
DOUBLE = [row for row in ROWS if row.extra]
TRANSFORMS = [row for row in ROWS if row.id in ("random", "centralize", "bb", "unit")]


def parametrize(rows: list[Row] = ROWS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


every_row = parametrize()


def make_params(seed: int = 0, dtype: Any = np.float32) -> Any:
    """Makes leaves that each transform treats differently; 8 divides their sizes."""
    rng = np.random.default_rng(seed)
    tree = {
        "conv": {"kernel": rng.normal(size=(2, 2, 2, 8)), "bias": rng.normal(size=8)},
        "list": [rng.normal(size=(16, 3))],
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def make_mixed() -> Any:
    dtypes = iter([jnp.bfloat16, jnp.float32, jnp.float16])
    return jax.tree.map(lambda x: x.astype(next(dtypes)), make_params())


PARAMS = make_params()
GRADS = grad_fn(PARAMS, 0)


def make_step(
    tx: Any, extra: Mapping[str, Any]
) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad_fn(params, 0), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, extra: Mapping[str, Any], params: Any = PARAMS, steps: int = 3) -> Any:
    """Returns params and state after a few steps. With jit it would take longer."""
    step, carry = make_step(tx, extra), (params, tx.init(params))
    for _ in range(steps):
        carry = step(*carry)
    return carry


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def plain(tree: Any) -> Any:
    """Replaces typed keys by numbers, which can be compared."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_close(a: Any, b: Any, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    chex.assert_trees_all_close(plain(a), plain(b), rtol=rtol, atol=atol)


def assert_equal(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal(plain(a), plain(b))


def buffers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(plain(tree))]


def types(tree: Any) -> Any:
    """The shape, dtype, weak type and, on an explicit mesh, sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)


# Two values of every numeric argument. Other arguments cannot be traced.
BB_SWEEP = {
    "learning_rate": [0.05, 0.2],
    "beta": [0.0, 0.8],
    "nu": [1.0, 1.5],
    "min_scale": [0.1, 0.9],
    "max_scale": [1.1, 3.0],
}
SWEEPS = {
    "random-half": {"minval": [-0.5, 1], "maxval": [0.5, 2], "probability": [0.3, 0.9]},
    "bb": BB_SWEEP,
    "unit": {"eps": [0.0, 0.5]},
    "step-tuned": {**BB_SWEEP, "delta": [0.0, 0.5]},
    "pugd": {
        "learning_rate": [0.05, 0.2],
        "momentum": [0.0, 0.8],
        "weight_decay": [0.0, 0.1],
    },
}
NOT_NUMBERS = {"key", "reduction_axes", "conv_only"}

STATES = tuple(x for x in vars(optax_tricks).values() if isinstance(x, type))
