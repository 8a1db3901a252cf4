"""Orders, and the two ways of examples to the step, which are to be one to the user."""

import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import data
from train.data import inputs
from train.data.inputs import Resident, Sequential, Shuffled, Stream, open_inputs
from train.errors import UsageError

sizes = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 2**32 - 1))
)


@given(sizes)
@settings(deadline=None)
def test_every_example_once_in_each_epoch(drawn):
    num_examples, batch_size, seed = drawn
    order = Shuffled((seed, 7), num_examples, batch_size)
    epochs = 3
    steps = -(-epochs * num_examples // batch_size)
    stream = np.concatenate([order.rows(step) for step in range(steps)])
    for epoch in range(epochs):
        part = stream[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))
    for epoch in range(1, epochs + 1):
        steps = order.steps_before(epoch) - order.steps_before(epoch - 1)
        assert num_examples // batch_size <= steps <= -(-num_examples // batch_size)


def test_orders_differ_by_epoch_and_seed_only():
    def epoch(seed, number):
        order = Shuffled((seed, 0), 50, 10)
        first = order.steps_before(number)
        return np.concatenate([order.rows(first + i) for i in range(5)]).tolist()

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)


@given(st.integers(1, 40), st.integers(1, 50))
def test_evaluation_has_every_example_once_and_fills_up_the_rest(n, batch_size):
    order = Sequential(n, batch_size)
    for epoch in range(2):
        steps = range(order.steps_before(epoch), order.steps_before(epoch + 1))
        rows = np.concatenate([order.rows(step) for step in steps])
        assert rows[rows >= 0].tolist() == list(range(n))
        assert (rows[n:] == -1).all()
        assert len(rows) < n + batch_size


@pytest.fixture(scope="module")
def split():
    return data.load("digits").split("test").part(0, 70)


def batches(way, order, first_step, count):
    make = jax.jit(way.batch)
    feeds = way.feeds(order, first_step)
    found = [
        jax.device_get(make(feed, jnp.int32(first_step + i)))
        for i, feed in enumerate(itertools.islice(feeds, count))
    ]
    feeds.close()
    return found


ORDERS = {
    "train": Shuffled((3, 4), 70, 16),
    "evaluate": Sequential(70, 16),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("first_step", [0, 3, 9])
def test_both_ways_give_the_same_batches(split, order, first_step):
    resident = batches(Resident(split.arrays()), order, first_step, 8)
    streamed = batches(Stream(split, num_workers=0), order, first_step, 8)
    for a, b in zip(resident, streamed, strict=True):
        there = a["weight"] > 0
        assert a.keys() == b.keys() == {"image", "label", "weight"}
        np.testing.assert_array_equal(a["weight"], b["weight"])
        for name in ("image", "label"):
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name][there], b[name][there])


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_a_run_goes_on_at_its_step(split, kind):
    way = (
        Resident(split.arrays()) if kind == "resident" else Stream(split, num_workers=0)
    )
    whole = batches(way, ORDERS["train"], 0, 10)
    for first_step in (1, 4, 5, 9):
        rest = batches(way, ORDERS["train"], first_step, 10 - first_step)
        for a, b in zip(whole[first_step:], rest, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])


def test_weights_make_sums_exact(split):
    labels = split.arrays()["label"]
    for way in (Resident(split.arrays()), Stream(split, num_workers=0)):
        found = batches(way, ORDERS["evaluate"], 0, ORDERS["evaluate"].steps_before(1))
        total = sum((batch["label"] * batch["weight"]).sum() for batch in found)
        assert total == labels.sum()
        assert sum(batch["weight"].sum() for batch in found) == 70


def test_processes_share_every_batch(split):
    whole = batches(Stream(split, num_workers=0), ORDERS["train"], 2, 4)
    parts = [
        batches(
            Stream(split, num_workers=0, process_index=i, process_count=4),
            ORDERS["train"],
            2,
            4,
        )
        for i in range(4)
    ]
    for expected, *shares in zip(whole, *parts, strict=True):
        joined = np.concatenate([share["image"] for share in shares])
        np.testing.assert_array_equal(joined, expected["image"])
    three = Stream(split, num_workers=0, process_index=0, process_count=3)
    with pytest.raises(UsageError, match="16 must be a multiple of the 3 processes"):
        three.feed_shapes(ORDERS["train"])


def test_a_process_without_examples_gets_a_batch_of_nothing(split):
    order = Sequential(5, 4)  # its last batch has one example, for two processes
    way = Stream(split.part(0, 5), num_workers=0, process_index=1, process_count=2)
    last = batches(way, order, 1, 1)[0]
    assert last["weight"].tolist() == [0, 0]
    assert last["image"].shape == (2, 8, 8, 1)


def test_wrong_numbers_are_refused(split):
    with pytest.raises(UsageError, match="workers must be 0 or more, got -1"):
        Stream(split, num_workers=-1)
    with pytest.raises(UsageError, match=r"20 must be from 1 to the 10 .*--batch-size"):
        Shuffled((0,), 10, 20)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(split):
    order = ORDERS["train"]
    expected = batches(Stream(split, num_workers=0), order, 3, 6)
    found = batches(Stream(split, num_workers=2), order, 3, 6)
    for a, b in zip(expected, found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shapes_are_known_beforehand(split):
    order = ORDERS["train"]
    for way in (Resident(split.arrays()), Stream(split, num_workers=0)):
        feeds = way.feeds(order)
        found = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), next(feeds))
        feeds.close()
        shapes = way.feed_shapes(order)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), shapes) == found


def test_nothing_moves_in_an_epoch_of_resident_data(split):
    way = Resident(split.arrays())
    feeds = way.feeds(ORDERS["train"])
    step = jax.jit(lambda feed, i: (way.batch(feed, i)["image"].sum(), i + 1))
    first, i = next(feeds), jnp.int32(0)
    _, i = step(first, i)
    with jax.transfer_guard("disallow"):
        for _ in range(ORDERS["train"].steps_before(1) - 1):
            _, i = step(next(feeds), i)


def test_the_way_is_chosen_by_size(split, monkeypatch):
    splits = {"train": split, "test": split}
    assert split.num_bytes == 70 * (8 * 8 + 4)
    monkeypatch.setattr(inputs, "device_bytes", lambda: 4 * 2 * split.num_bytes)
    assert {type(way) for way in open_inputs(splits).values()} == {Resident}
    monkeypatch.setattr(inputs, "device_bytes", lambda: 4 * 2 * split.num_bytes - 1)
    assert {type(way) for way in open_inputs(splits).values()} == {Stream}
    forced = open_inputs(splits, mode="resident")
    assert {type(way) for way in forced.values()} == {Resident}
    with pytest.raises(UsageError, match="must be auto, resident or stream"):
        open_inputs(splits, mode="disk")


def test_memory_of_the_device_is_known():
    assert 1 << 28 < inputs.device_bytes() < 1 << 50


def test_splits_travel_to_worker_processes(split):
    copy = pickle.loads(pickle.dumps(split))
    rows = [5, 0, 69]
    jax.tree.map(np.testing.assert_array_equal, copy.read(rows), split.read(rows))


def test_the_cache_equals_what_is_read(split):
    arrays = split.arrays()
    jax.tree.map(np.testing.assert_array_equal, arrays, split.read(range(70)))
    assert isinstance(arrays["image"], np.memmap)


def test_a_cache_belongs_to_one_size_and_fit():
    scenes = data.load("digit_scenes")
    small = data.load("digit_scenes", size=(16, 24))
    assert scenes.split("test").arrays()["image"].shape == (500, 64, 64, 3)
    assert small.split("test").arrays()["image"].shape == (500, 16, 24, 3)
    stretched = dataclasses.replace(
        small.split("test"),
        reader=dataclasses.replace(small.split("test").reader, fit="stretch"),
    )
    assert (stretched.arrays()["mask"] != small.split("test").arrays()["mask"]).any()
