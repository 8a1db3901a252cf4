"""How the transforms are called: extra arguments and second gradients."""

from typing import Any

import jax.numpy as jnp
import optax

import optax_tricks
from tests.optax_tricks.table import (
    DOUBLE,
    GRADS,
    PARAMS,
    ROWS,
    Row,
    assert_equal,
    every_row,
    grad_fn,
    parametrize,
    types,
)


def test_the_table_has_every_transform() -> None:
    public = {getattr(optax_tricks, name) for name in optax_tricks.__all__}
    # States are types, and three are plain functions.
    other = {x for x in public if isinstance(x, type)} | {
        optax_tricks.global_norms,
        optax_tricks.logged_scalars,
        optax_tricks.triangular_schedule,
    }
    assert {row.factory for row in ROWS} == public - other


@every_row
def test_unknown_extra_arguments_are_dropped(row: Row) -> None:
    tx = row.build()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(PARAMS)
    expected = tx.update(GRADS, state, PARAMS, **row.extra)
    got = tx.update(GRADS, state, PARAMS, **row.extra, value=1.0, unknown=object())
    assert_equal(got, expected)


@every_row
def test_chain_passes_each_transform_the_extra_argument_it_needs(row: Row) -> None:
    tx = optax.chain(row.build(), optax.contrib.reduce_on_plateau())
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS, **row.extra, value=jnp.float32(1.5))
    assert optax.tree.get(state, "best_value") == 1.5


@parametrize(DOUBLE)
def test_grad_fn_is_called_once_per_update_with_step_zero(row: Row) -> None:
    calls = []

    def counted(params: Any, step: int) -> Any:
        calls.append((step, types(params)))
        return grad_fn(params, step)

    tx = row.build()
    state = tx.init(PARAMS)
    for k in range(1, 4):
        _, state = tx.update(GRADS, state, PARAMS, grad_fn=counted)
        assert calls == [(0, types(PARAMS))] * k
