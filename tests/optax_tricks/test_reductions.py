"""The sums and means of the transforms against NumPy in float64, at critical sizes.

jaxlib 0.10.2 computes some reductions wrongly on CPUs if they are fused with the matrix
product whose rows they reduce (jax-ml/jax#39103). So the gradients here are matrix
products, and everything is jitted. docs/numerics.md says which versions are affected.
"""

import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest

import optax_tricks

# Both sides of the limits at which kernels change how they divide their work. The known
# fault is from 32,769 to 43,689 rows of three numbers.
SIZES = [2**15 - 1, 2**15, 2**15 + 1, 40_000, 2**16 - 1, 2**16 + 1, 2**20]
every_size = pytest.mark.parametrize("n", SIZES)

MATRIX = np.diag([1.0, 2.0, 3.0]) + 0.25
RATE = 0.1


def make_rows(n: int) -> np.ndarray:
    """Makes n rows of three positive numbers, of which the last weigh like all others.

    So a single wrong row at the end, where work is divided unevenly, changes every sum.
    """
    envelope = 1 + np.sqrt(n) * np.exp(-(n - 1 - np.arange(n)) / 8)
    rows = np.random.default_rng(n).uniform(0.5, 1.5, (n, 3)) * envelope[:, None]
    return rows.astype(np.float32)


class Layout(NamedTuple):
    """A form of the parameters, and their gradient in JAX and in NumPy."""

    params: Callable[[np.ndarray], np.ndarray]
    gradient: Callable[[jax.Array, Any], jax.Array]
    reference: Callable[[np.ndarray], np.ndarray]


def times_matrix(x: jax.Array) -> jax.Array:
    return jnp.asarray(MATRIX, x.dtype) @ x


LAYOUTS = {
    "rows": Layout(
        lambda rows: rows, lambda w, _: times_matrix(w.T).T, lambda w: w @ MATRIX
    ),
    "vmapped-rows": Layout(
        lambda rows: rows, lambda w, _: jax.vmap(times_matrix)(w), lambda w: w @ MATRIX
    ),
    "columns": Layout(
        lambda rows: rows.T.copy(), lambda w, _: times_matrix(w), lambda w: MATRIX @ w
    ),
    "vector": Layout(
        lambda rows: rows[:, 0].copy(), lambda w, _: 3 * w, lambda w: 3 * w
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def assert_close(got: Any, expected: Any, scale: Any = None) -> None:
    """Compares to 1e-5 of the expected values, or of a scale of the same shape."""
    got = np.asarray(got, np.float64)
    scale = np.abs(expected) if scale is None else scale
    error = np.abs(got - expected) / scale
    wrong = int(np.sum(~(error < 1e-5)))
    assert not wrong, f"{wrong} of {error.size} are wrong, by up to {np.max(error)}"


class Norms:
    """Norms and inner products of one model, or of each row."""

    def __init__(self, axis: int | None):
        self.axis = axis

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * b, axis=self.axis, keepdims=self.axis is not None)

    def norm(self, a: np.ndarray) -> np.ndarray:
        return np.sqrt(self.product(a, a))


def expected_unit(
    norms: Norms, w: np.ndarray, gradient: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    g = gradient(w)
    weighted = np.abs(w) * g
    second = gradient(w + weighted / norms.norm(weighted))
    return (g + second) / norms.norm(g + second), {
        "pugd_perturbation_norm": norms.norm(weighted),
        "pugd_gradient_norm": norms.norm(g),
        "pugd_perturbed_gradient_norm": norms.norm(second),
    }


def expected_bb(
    norms: Norms, w: np.ndarray, gradient: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    g = gradient(w)
    second = gradient(w - RATE * g)
    return g + second, {
        "bb_curvature": norms.product(second - g, -RATE * g),
        "bb_gradient_norm": norms.norm(g),
        "bb_half_gradient_norm": norms.norm(second),
    }


TRANSFORMS = {
    "unit": (optax_tricks.perturbed_unit_step(), expected_unit),
    "bb": (optax_tricks.barzilai_borwein_step(RATE), expected_bb),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def update(name: str, gradient: Callable[..., Any]) -> Callable[[jax.Array], Any]:
    """Returns a function from parameters to the updates and the state after them."""
    tx, _ = TRANSFORMS[name]
    return lambda w: tx.update(gradient(w, 0), tx.init(w), w, grad_fn=gradient)


@every_size
@every_layout
@every_transform
@pytest.mark.slow
def test_norms_and_products_of_one_model(name: str, layout: Layout, n: int) -> None:
    w = layout.params(make_rows(n))
    updates, state = jax.jit(update(name, layout.gradient))(w)
    wide = w.astype(np.float64)
    expected, fields = TRANSFORMS[name][1](Norms(None), wide, layout.reference)
    assert_close(updates, expected)
    for field, value in fields.items():
        assert_close(getattr(state, field), value)


@every_size
@every_transform
def test_norms_and_products_of_two_models_under_vmap(name: str, n: int) -> None:
    layout = LAYOUTS["rows"]
    w = np.stack([make_rows(n), 1 + make_rows(n)])
    updates, state = jax.jit(jax.vmap(update(name, layout.gradient)))(w)
    for i, wide in enumerate(w.astype(np.float64)):
        expected, fields = TRANSFORMS[name][1](Norms(None), wide, layout.reference)
        assert_close(updates[i], expected)
        for field, value in fields.items():
            assert_close(getattr(state, field)[i], value)


def gradient_of_row(w: jax.Array, step: Any) -> jax.Array:
    del step
    return times_matrix(w)


@every_size
@every_transform
def test_norms_and_products_of_many_models_under_vmap(name: str, n: int) -> None:
    w = make_rows(n)
    updates, state = jax.jit(jax.vmap(update(name, gradient_of_row)))(w)
    wide = w.astype(np.float64)
    expected, fields = TRANSFORMS[name][1](Norms(1), wide, lambda w: w @ MATRIX)
    assert_close(updates, expected)
    for field, value in fields.items():
        assert_close(getattr(state, field)[:, None], value)


@every_size
@pytest.mark.parametrize("name", ["rows", "vmapped-rows", "columns"])
@pytest.mark.slow
def test_means_of_centralize(name: str, n: int) -> None:
    layout = LAYOUTS[name]
    w = layout.params(make_rows(n))
    g = layout.reference(w.astype(np.float64))
    for axes in (None, (0,), (1,)):
        tx = optax_tricks.centralize(axes)

        def centered(w: jax.Array, tx: Any = tx) -> jax.Array:
            return tx.update(layout.gradient(w, 0), optax.EmptyState())[0]

        mean = g.mean(axes or (0,), keepdims=True)
        assert_close(jax.jit(centered)(w), g - mean, scale=np.abs(g) + np.abs(mean))
        two = jax.jit(jax.vmap(centered))(np.stack([w, w]))
        for got in two:
            assert_close(got, g - mean, scale=np.abs(g) + np.abs(mean))


# --- The known fault ------------------------------------------------------------------

AFFECTED = (
    jaxlib.__version__ == "0.10.2"
    and platform.machine() in ("x86_64", "AMD64")
    and "-reduce" not in os.environ.get("XLA_FLAGS", "")
)
known_fault = pytest.mark.xfail(
    AFFECTED,
    reason="jaxlib 0.10.2 is wrong on CPUs (jax-ml/jax#39103); 0.9.2, 0.10.0, 0.10.1, "
    "0.11.0, 0.11.1, 0.11.2 and 0.12.0.1 are right",
    strict=True,
)
AFFECTED_SIZES = [2**15 + 1, 40_000]


@known_fault
@pytest.mark.parametrize("n", AFFECTED_SIZES)
def test_sums_of_squares_of_matrix_products(n: int) -> None:
    """The program of the issue: it has nothing of ours in it."""
    count = jnp.arange(n, dtype=jnp.float32)
    rows = jnp.stack([count, 0 * count, 0 * count], axis=1)
    matrix = jnp.eye(3)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    assert_close(got[1:], np.arange(1.0, n) ** 2)


@pytest.mark.parametrize("n", AFFECTED_SIZES)
@pytest.mark.parametrize(
    ("name", "field"), [("unit", "pugd_gradient_norm"), ("bb", "bb_gradient_norm")]
)
def test_one_field_of_many_models_under_vmap(name: str, field: str, n: int) -> None:
    """The same program, made by a user who reads one norm and drops the updates."""
    w = make_rows(n)
    step = update(name, gradient_of_row)
    got = jax.jit(jax.vmap(lambda row: getattr(step(row)[1], field)))(w)
    assert_close(got, np.linalg.norm(w.astype(np.float64) @ MATRIX, axis=1))
