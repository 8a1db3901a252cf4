"""Updates keep the dtype of the gradient, and states keep their own."""

import inspect
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import optax_tricks
from tests.optax_tricks.table import (
    COSINE,
    GRADS,
    PARAMS,
    ROWS,
    SINGLE,
    STATES,
    SWEEPS,
    Row,
    assert_close,
    every_row,
    grad_fn,
    is_key,
    make_mixed,
    make_params,
    parametrize,
)


def assert_as_documented(state: Any, scalars: Any) -> None:
    """Checks the fields of states and their dtypes against the docstrings."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, STATES)):
        if isinstance(node, STATES):
            lines = r"^  (\w+): (\w+)"
            kinds = re.findall(lines, inspect.getdoc(type(node)), re.MULTILINE)
            assert [name for name, _ in kinds] == list(node._fields)
            for name, kind in kinds:
                for leaf in jax.tree.leaves(getattr(node, name)):
                    if kind == "typed":
                        assert is_key(leaf)
                    elif kind == "the":  # a tree like the parameters
                        assert jnp.finfo(leaf.dtype).bits >= 32
                    elif kind == "float":
                        assert (leaf.dtype, leaf.shape) == (scalars, ())
                    else:
                        assert (leaf.dtype, leaf.shape) == (kind, ())


def assert_types_are_kept(row: Row, params: Any, grads: Any) -> None:
    tx = row.build()
    update = partial(tx.update, **row.extra)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(update, grads, state, params)
    # A ShapeDtypeStruct compares shape, dtype, weak type and sharding.
    assert updates == jax.eval_shape(lambda: grads)
    assert after == state
    dtypes = [w.dtype for w in jax.tree.leaves(params)]
    scalars = (
        "float64" if {"float64", "complex128"} & set(map(str, dtypes)) else "float32"
    )
    assert_as_documented(after, scalars)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@every_row
def test_dtypes_are_kept(row: Row, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = make_params(0, dtype)
        assert_types_are_kept(row, params, grad_fn(params, 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_row
def test_scalars_are_float64_if_one_leaf_is(row: Row, dtype: str) -> None:
    with jax.enable_x64(True):
        params = {**make_params(0, dtype), "wide": jnp.ones((2, 3))}
        assert_types_are_kept(row, params, grad_fn(params, 0))


@parametrize(SINGLE)
def test_complex_dtypes_are_kept(row: Row) -> None:
    for dtype in ("complex64", "complex128"):
        with jax.enable_x64(dtype == "complex128"):
            params = make_params(0, dtype)
            assert_types_are_kept(row, params, grad_fn(params, 0))


def test_scalars_of_double_precision_are_exact_to_double_precision() -> None:
    # The loss is quadratic, so the curvature is known.
    with jax.enable_x64(True):
        w = jnp.array([1 / 3, -2 / 7])
        scale = jnp.array([1.7, 2.3])
        gradient = lambda w, step: scale * w  # noqa: E731
        bb = optax_tricks.barzilai_borwein_step(0.1, beta=0.0)
        _, state = bb.update(gradient(w, 0), bb.init(w), w, grad_fn=gradient)
        g = gradient(w, 0)
        expected = 0.1 * jnp.sum(g**2) / jnp.sum(0.1 * scale * g**2)
        assert abs(state.bb_step_size / jnp.clip(expected, 0.5, 2) - 1) < 1e-15
        assert abs(state.bb_gradient_norm / jnp.linalg.norm(g) - 1) < 1e-15
        unit = optax_tricks.perturbed_unit_step()
        _, state = unit.update(g, unit.init(w), w, grad_fn=gradient)
        assert abs(state.pugd_gradient_norm / jnp.linalg.norm(g) - 1) < 1e-15
        random = optax_tricks.scale_by_random(0, minval=0.1, maxval=0.1)
        _, state = random.update(g, random.init(w))
        assert state.random_factor == 0.1


@every_row
def test_mixed_dtypes_are_kept_and_come_close_to_single_precision(row: Row) -> None:
    params = make_mixed()
    grads = grad_fn(params, 0)
    assert_types_are_kept(row, params, grads)
    got, _ = row.build().update(grads, row.build().init(params), params, **row.extra)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
    exact, _ = row.build().update(
        same[0], row.build().init(same[1]), same[1], **row.extra
    )
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    assert_close(got, exact, rtol=4 * 2**-8, atol=2**-9)


@parametrize([row for row in ROWS if row.factory is not optax_tricks.pugd])
def test_updates_keep_the_dtype_of_the_gradient_not_of_the_parameters(row: Row) -> None:
    # Without pugd: optax.add_decayed_weights promotes to the wider of the two.
    assert_types_are_kept(row, PARAMS, jax.tree.map(jnp.bfloat16, GRADS))


@parametrize([row for row in ROWS if COSINE not in row.kwargs.values()])
def test_strict_promotion(row: Row) -> None:
    # Without the schedules: those of optax divide an int by a float.
    params = make_mixed()
    with jax.numpy_dtype_promotion("strict"):
        assert_types_are_kept(row, params, grad_fn(params, 0))


# Without pugd: the transforms of optax in it widen, as they do in optax.sgd.
@parametrize([row for row in ROWS if row.id in SWEEPS and row.id != "pugd"])
def test_hyperparameters_given_as_arrays_do_not_widen(row: Row) -> None:
    changes = {name: jnp.float32(values[0]) for name, values in SWEEPS[row.id].items()}
    params = make_params(0, jnp.bfloat16)
    row = row._replace(kwargs={**row.kwargs, **changes})
    assert_types_are_kept(row, params, grad_fn(params, 0))


def test_gradient_differences_are_averaged_in_single_precision() -> None:
    # A tenth of each difference is added, most of which bfloat16 would lose.
    state = optax_tricks.barzilai_borwein_step(0.1).init(make_params(0, jnp.bfloat16))
    leaves = jax.tree.leaves(state.bb_difference)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
