"""The states of the transforms under cond, donation and sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_tricks
from tests.optax_tricks.table import (
    PARAMS,
    Row,
    assert_close,
    assert_equal,
    buffers,
    every_row,
    make_step,
    plain,
    run,
    types,
)


@every_row
def test_old_and_new_state_can_be_branches_of_cond(row: Row) -> None:
    _, old = run(row.optimizer(), row.extra, steps=1)
    _, new = run(row.optimizer(), row.extra, steps=2)
    assert types(old) == types(new)
    got = jax.jit(lambda keep: jax.lax.cond(keep, lambda: old, lambda: new))(False)
    assert_equal(got, new)


@every_row
def test_abstract_init(row: Row) -> None:
    tx = row.build()
    state = tx.init(PARAMS)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert types(tx.init(abstract)) == types(state)
    assert jax.eval_shape(tx.init, abstract) == jax.eval_shape(lambda: state)


# The number of trees like the parameters in a state.
COPIES = {
    optax_tricks.barzilai_borwein_step: 1,
    optax_tricks.step_tuned_sgd: 1,
    optax_tricks.pugd: 1,
}


@every_row
def test_map_params(row: Row) -> None:
    tx = row.build()
    specs = jax.tree.map(lambda w: f"spec of {w.shape}", PARAMS)
    mapped = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(PARAMS),
        specs,
        transform_non_params=lambda _: None,
    )
    assert jax.tree.leaves(mapped) == COPIES.get(row.factory, 0) * jax.tree.leaves(
        specs
    )


@every_row
def test_donation(row: Row) -> None:
    key = jax.random.key(7)
    own_key = {"key": key} if "key" in row.kwargs else {}
    tx = row.optimizer(**own_key)
    expected = run(tx, row.extra)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    # Donation would delete buffers that are shared with the parameters or the key.
    owned = [buffers(tree) for tree in (params, key, state)]
    assert len(set().union(*owned)) == sum(map(len, owned))
    step = make_step(tx, row.extra)
    # Unused arguments would not be donated.
    donating = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    carry = params, state
    for _ in range(3):
        carry = donating(*carry)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert_close(carry, expected)
    assert_equal(key, jax.random.key(7))


AXIS_TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


@pytest.mark.parametrize("axis_type", AXIS_TYPES.values(), ids=AXIS_TYPES)
@every_row
def test_sharding(row: Row, axis_type: AxisType) -> None:
    tx, traces = row.optimizer(), 0
    expected = run(tx, row.extra)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    # Also along an axis that is averaged over.
    specs = {
        "conv": {"kernel": P(None, None, None, "d"), "bias": P("d")},
        "list": [P("d", None)],
    }

    def step(params: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return make_step(tx, row.extra)(params, state)

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(put, PARAMS, specs)
        start = carry = params, tx.init(params)
        jitted = jax.jit(step)
        for _ in range(3):
            # Many pending steps can hang the simulated devices.
            carry = jax.block_until_ready(jitted(*carry))
    assert traces == 1
    assert types(carry) == types(start)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(carry), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    assert_close(jax.device_get(plain(carry)), plain(expected))
