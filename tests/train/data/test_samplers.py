"""Samplers: every example once in each epoch, decided by the step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.samplers import RandomSampler, SequentialSampler
from train.errors import UsageError

sizes = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 2**32 - 1))
)


@given(sizes)
@settings(deadline=None)
def test_every_example_once_in_each_epoch(drawn):
    num_examples, batch_size, seed = drawn
    sampler = RandomSampler((seed, 7), num_examples, batch_size)
    epochs = 3
    steps = -(-epochs * num_examples // batch_size)
    stream = np.concatenate([sampler.rows(step) for step in range(steps)])
    for epoch in range(epochs):
        part = stream[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))
    for epoch in range(1, epochs + 1):
        steps = sampler.steps_before(epoch) - sampler.steps_before(epoch - 1)
        assert num_examples // batch_size <= steps <= -(-num_examples // batch_size)


def test_random_orders_differ_by_epoch_and_seed_only():
    def epoch(seed, number):
        sampler = RandomSampler((seed, 0), 50, 10)
        first = sampler.steps_before(number)
        return np.concatenate([sampler.rows(first + i) for i in range(5)]).tolist()

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)


@given(st.integers(1, 40), st.integers(1, 50))
def test_evaluation_has_every_example_once_and_fills_up_the_rest(n, batch_size):
    sampler = SequentialSampler(n, batch_size)
    for epoch in range(2):
        steps = range(sampler.steps_before(epoch), sampler.steps_before(epoch + 1))
        rows = np.concatenate([sampler.rows(step) for step in steps])
        assert rows[rows >= 0].tolist() == list(range(n))
        assert (rows[n:] == -1).all()
        assert len(rows) < n + batch_size


@pytest.mark.parametrize(("n", "batch_size"), [(70, 16), (5, 8), (6, 3), (1, 1)])
def test_weights_tell_examples_from_filling(n, batch_size):
    sampler = SequentialSampler(n, batch_size)
    traced = jax.jit(sampler.weights)
    for step in range(2 * sampler.steps_before(1) + 1):
        expected = sampler.rows(step) >= 0
        for found in (sampler.weights(step), traced(jnp.int32(step))):
            assert (found.shape, found.dtype) == ((batch_size,), jnp.float32)
            np.testing.assert_array_equal(found, expected)


def test_weights_are_right_however_long_a_run_is():
    sampler = SequentialSampler(70, 16)
    last = np.iinfo(np.int32).max
    expected = sampler.rows(last) >= 0
    assert last % sampler.steps_before(1) == 2
    np.testing.assert_array_equal(jax.jit(sampler.weights)(jnp.int32(last)), expected)


@pytest.mark.parametrize("batch_size", [0, 11, 20])
def test_batches_larger_than_an_epoch_are_refused(batch_size):
    with pytest.raises(UsageError, match=rf"from 1 to 10, .* got {batch_size}"):
        RandomSampler((0,), 10, batch_size)
