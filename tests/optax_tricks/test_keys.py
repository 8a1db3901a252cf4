"""Every form of key that `scale_by_random` takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_tricks
from tests.optax_tricks.table import (
    GRADS,
    PARAMS,
    assert_equal,
    buffers,
    types,
)

SEEDS = {
    "int": 3,
    "numpy": np.int64(3),
    "array": jnp.int32(3),
    "typed": jax.random.key(3),
    "legacy": jax.random.PRNGKey(3),
    "legacy-numpy": np.asarray(jax.random.PRNGKey(3)),
}


@pytest.mark.parametrize("key", SEEDS.values(), ids=SEEDS)
def test_forms_of_a_key(key: Any) -> None:
    state = optax_tricks.scale_by_random(key).init(PARAMS)
    assert_equal(state.random_key, jax.random.key(3))
    assert types(state.random_key) == types(jax.random.key(3))
    if isinstance(key, jax.Array):  # it is not deleted with a donated state
        assert not set(buffers(key)) & set(buffers(state))


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**32 - 1, 2**40])
def test_any_seed_that_jax_takes(seed: int) -> None:
    state = optax_tricks.scale_by_random(seed).init(PARAMS)
    assert_equal(state.random_key, jax.random.key(seed))


def test_the_generator_of_a_key_is_kept() -> None:
    key = jax.random.key(3, impl="rbg")
    tx = optax_tricks.scale_by_random(key)
    _, state = tx.update(GRADS, tx.init(PARAMS))
    assert jax.random.key_impl(state.random_key) == jax.random.key_impl(key)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_batch_of_keys_is_refused(make: Callable[[int], jax.Array]) -> None:
    keys = jax.random.split(make(0), 4)
    with pytest.raises(ValueError, match=r"keys of shape \(4,\)\. Build the .*vmap"):
        optax_tricks.scale_by_random(keys).init(PARAMS)


@pytest.mark.parametrize(
    "key",
    ["0", None, 0.5, [0, 1], np.float32(0.5), jnp.float32(3), jnp.ones(2)],
    ids=repr,
)
def test_what_is_no_key_is_refused(key: Any) -> None:
    with pytest.raises(ValueError, match=r"^key must be an int or a PRNG key, got "):
        optax_tricks.scale_by_random(key)


@pytest.mark.parametrize("key", [2**63, 2**70, -(2**63) - 1])
def test_an_int_of_more_than_64_bits_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match=r"^key must be at least -2\*\*63 and below 2"):
        optax_tricks.scale_by_random(key)


@pytest.mark.parametrize("key", [2**63 - 1, -(2**63), np.uint64(2**64 - 1)])
def test_an_int_of_64_bits_is_a_key(key: Any) -> None:
    state = optax_tricks.scale_by_random(key).init(PARAMS)
    assert (jax.random.key_data(state.random_key) == jax.random.PRNGKey(key)).all()
