"""The transforms in optax's wrappers, such as masked and MultiSteps."""

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks
from tests.optax_tricks.table import (
    DOUBLE,
    GRADS,
    LR,
    PARAMS,
    ROWS,
    SINGLE,
    TRANSFORMS,
    Row,
    assert_close,
    assert_equal,
    every_row,
    first_axis,
    grad_fn,
    loss,
    make_params,
    parametrize,
)


@every_row
def test_inject_hyperparams(row: Row) -> None:
    # A function that is not static is called as a schedule.
    static = [k for k, v in row.kwargs.items() if v is first_axis]
    plain_tx = row.build()
    injected = optax.inject_hyperparams(row.factory, static_args=static)(**row.kwargs)
    state, own = injected.init(PARAMS), plain_tx.init(PARAMS)
    # Under jit the numbers are traced, and the checks of ranges must accept that.
    update = jax.jit(lambda g, s, p: injected.update(g, s, p, **row.extra))
    for seed in range(2):
        params = make_params(seed)
        got, state = update(grad_fn(params, 0), state, params)
        expected, own = plain_tx.update(grad_fn(params, 0), own, params, **row.extra)
        assert_close(got, expected)
    if jax.tree.structure(state.inner_state) == jax.tree.structure(own):
        assert_close(state.inner_state, own)  # optax's rate has two states


def test_axes_that_are_called_as_a_schedule_are_refused() -> None:
    # Of the step count, which has no axes, this returns ().
    axes = partial(jax.tree.map, lambda leaf: tuple(range(leaf.ndim - 1)))
    injected = optax.inject_hyperparams(optax_tricks.centralize)(reduction_axes=axes)
    with pytest.raises(ValueError, match=r'would change no leaf.*static_args=\("redu'):
        injected.init(PARAMS)


@parametrize([row for row in ROWS if row.id in ("random", "bb", "unit", "step-tuned")])
def test_injected_schedules_reach_the_transform(row: Row) -> None:
    name = {
        "random": "minval",
        "bb": "learning_rate",
        "unit": "eps",
        "step-tuned": "nu",
    }[row.id]
    values = [0.1, 0.7]
    wave = lambda count: jnp.array(values)[count]  # noqa: E731
    injected = optax.inject_hyperparams(row.factory)(**{**row.kwargs, name: wave})
    state = injected.init(PARAMS)
    own = row.build().init(PARAMS)
    for value in values:
        got, state = injected.update(GRADS, state, PARAMS, **row.extra)
        assert state.hyperparams[name] == np.float32(value)
        tx = row.build(**{name: value})
        expected, own = tx.update(GRADS, own, PARAMS, **row.extra)
        assert_close((got, state.inner_state), (expected, own))


MASK = {"conv": {"kernel": True, "bias": False}, "list": [True]}
LABELS = jax.tree.map(lambda x: "on" if x else "off", MASK)


@parametrize(SINGLE)
def test_masked_and_partition(row: Row) -> None:
    tx = row.build()
    full, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    masked = optax.masked(tx, MASK)
    got, _ = masked.update(GRADS, masked.init(PARAMS), PARAMS)
    assert_equal(got, jax.tree.map(lambda on, u, g: u if on else g, MASK, full, GRADS))
    parts = optax.partition({"on": tx, "off": optax.set_to_zero()}, LABELS)
    got, _ = parts.update(GRADS, parts.init(PARAMS), PARAMS)
    assert_equal(got, jax.tree.map(lambda on, u, z: u if on else z, MASK, full, zeros))


@pytest.mark.parametrize("mask", [True, lambda p: jax.tree.map(lambda _: True, p)])
@every_row
def test_a_mask_that_is_true_everywhere(row: Row, mask: Any) -> None:
    tx, masked = row.build(), optax.masked(row.build(), mask)
    got, _ = masked.update(GRADS, masked.init(PARAMS), PARAMS, **row.extra)
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    assert_equal(got, expected)


@parametrize(DOUBLE)
def test_two_gradients_refuse_masks_and_name_a_remedy_that_works(row: Row) -> None:
    parts = {"on": row.build(), "off": optax.set_to_zero()}
    for wrapped in (optax.masked(row.build(), MASK), optax.partition(parts, LABELS)):
        with pytest.raises(ValueError, match=r"optax\.MaskedNode leaves") as error:
            wrapped.init(PARAMS)
    # A state from elsewhere does not help.
    state = row.build().init(PARAMS)
    masked = optax.masked(row.build(), MASK)
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        masked.update(GRADS, optax.MaskedState(state), PARAMS, **row.extra)

    remedy = re.search(
        r"optax\.chain\((\w+)\(\.\.\.\), optax\.partition", str(error.value)
    )
    assert remedy
    named = next(r for r in TRANSFORMS if r.factory.__name__ == remedy[1])
    parts = {"on": optax.sgd(LR), "off": optax.set_to_zero()}
    tx = optax.chain(named.build(), optax.partition(parts, LABELS))
    alone = named.optimizer()
    got, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    expected, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS, **row.extra)
    assert_close(got, jax.tree.map(lambda on, u: u if on else 0 * u, MASK, expected))


@parametrize(SINGLE)
def test_multi_steps_gives_the_mean_gradient_of_its_mini_steps(row: Row) -> None:
    tx, multi = row.build(), optax.MultiSteps(row.build(), 2)
    update = jax.jit(multi.update)
    grads = [grad_fn(make_params(seed), 0) for seed in range(2)]
    start = state = multi.init(PARAMS)
    idle, state = update(grads[0], state, PARAMS)
    assert_equal(idle, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(state.inner_opt_state, start.inner_opt_state)
    got, state = update(grads[1], state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    expected, inner = tx.update(mean, tx.init(PARAMS), PARAMS)
    assert_close((got, state.inner_opt_state), (expected, inner))


# Four micro-batches of data, and a gradient that is the mean over them.
MICRO = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 16)), jnp.float32)


def data_loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(batch @ params["list"][0])) + loss(params)


@jax.jit
def full_batch(params: Any, step: int) -> Any:
    del step
    return jax.grad(data_loss)(params, MICRO.reshape(-1, 16))


@jax.jit
def accumulated(params: Any, step: int) -> Any:
    """The documented way: accumulate inside grad_fn."""
    del step

    def add(total: Any, batch: jax.Array) -> Any:
        grads = jax.grad(data_loss)(params, batch)
        return jax.tree.map(lambda t, g: t + g / len(MICRO), total, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), MICRO)[0]


@parametrize(DOUBLE)
def test_multi_steps_evaluates_grad_fn_on_every_mini_step(row: Row) -> None:
    calls = []

    def counted(params: Any, step: int) -> Any:
        jax.debug.callback(lambda: calls.append(None))
        return grad_fn(params, step)

    multi = optax.MultiSteps(row.build(), 2)
    state = multi.init(PARAMS)
    update = jax.jit(lambda g, s, p: multi.update(g, s, p, grad_fn=counted))
    for _ in range(4):
        updates, state = update(GRADS, state, PARAMS)
    jax.effects_barrier()
    assert (len(calls), state.gradient_step) == (4, 2)
    chex.assert_tree_all_finite(updates)


@parametrize(DOUBLE)
def test_accumulating_inside_grad_fn_equals_the_full_batch(row: Row) -> None:
    tx, results = row.build(), []
    for gradient in (accumulated, full_batch):
        extra = {"grad_fn": gradient}
        state = tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(gradient(PARAMS, 0), state, PARAMS, **extra)
        results.append((updates, state))
    assert_close(*results)


@every_row
def test_apply_if_finite_skips_a_bad_step(row: Row) -> None:
    tx = optax.apply_if_finite(row.optimizer(), 5)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **row.extra))
    bad = jax.tree.map(lambda g: g.at[..., :1].set(jnp.nan) if g.ndim else g, GRADS)
    _, before = update(GRADS, tx.init(PARAMS), PARAMS)
    skipped, after = update(bad, before, PARAMS)
    assert_equal(skipped, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after.inner_state, before.inner_state)
    assert_equal(update(GRADS, after, PARAMS)[0], update(GRADS, before, PARAMS)[0])
    chex.assert_tree_all_finite(update(GRADS, after, PARAMS)[0])
