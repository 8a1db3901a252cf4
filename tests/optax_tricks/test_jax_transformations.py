"""The transforms under jit, scan and vmap."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp

import optax_tricks
from tests.optax_tricks.table import (
    GRADS,
    NOT_NUMBERS,
    PARAMS,
    ROWS,
    SWEEPS,
    Row,
    assert_close,
    every_row,
    make_params,
    make_step,
    parametrize,
    plain,
    run,
    types,
)


@every_row
def test_jit_equals_eager_and_compiles_once(row: Row) -> None:
    tx = row.optimizer()
    step = make_step(tx, row.extra)
    chex.clear_trace_counter()  # it identifies functions by their source
    jitted = jax.jit(chex.assert_max_traces(step, n=1))
    eager = compiled = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        eager, compiled = step(*eager), jitted(*compiled)
        assert_close(compiled, eager)
    for _ in range(97):
        compiled = jitted(*compiled)
    chex.assert_tree_all_finite(plain(compiled))


@every_row
def test_scan_equals_a_loop(row: Row) -> None:
    tx = row.optimizer()
    step, start = make_step(tx, row.extra), (PARAMS, tx.init(PARAMS))
    got, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=3)
    assert types(got) == types(start)
    assert_close(got, run(tx, row.extra))


@every_row
def test_vmap_over_seeds(row: Row) -> None:
    def train(seed: jax.Array, params: Any) -> Any:
        # The documented way: one transform per seed, built inside.
        changes = {"key": jax.random.key(seed)} if "key" in row.kwargs else {}
        return run(row.optimizer(**changes), row.extra, params)

    each = [(jnp.int32(seed), make_params(seed)) for seed in range(2)]
    expected = [plain(train(*x)) for x in each]
    got = jax.vmap(train)(*jax.tree.map(lambda *x: jnp.stack(x), *each))
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_seeds_under_vmap_draw_different_factors() -> None:
    def factor(key: jax.Array) -> jax.Array:
        tx = optax_tricks.scale_by_random(key)
        return tx.update(GRADS, tx.init(PARAMS))[1].random_factor

    factors = jax.vmap(factor)(jax.random.split(jax.random.key(0), 8))
    assert len(set(factors.tolist())) == 8


@parametrize([row for row in ROWS if row.id in SWEEPS])
def test_vmap_over_all_hyperparameters(row: Row) -> None:
    sweep = SWEEPS[row.id]
    assert set(sweep) == set(inspect.signature(row.factory).parameters) - NOT_NUMBERS

    def train(values: Any) -> Any:
        return run(row.optimizer(**values), row.extra, steps=2)

    each = [{name: values[i] for name, values in sweep.items()} for i in range(2)]
    expected = [plain(train(values)) for values in each]
    got = jax.vmap(train)({name: jnp.array(values) for name, values in sweep.items()})
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))
