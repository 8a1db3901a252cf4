"""Both loaders give the same batches, reproducibly, whatever the workers."""

import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import data
from train.data import loaders
from train.data.loaders import GrainLoader, InMemoryLoader, open_loaders
from train.data.samplers import RandomSampler, SequentialSampler
from train.errors import UsageError


@pytest.fixture(scope="module")
def split():
    return data.load("digits").split("test").part(0, 70)


def batches(loader, sampler, first_step, count):
    make = jax.jit(loader.batch)
    feeds = loader.feeds(sampler, first_step)
    found = [
        jax.device_get(make(feed, jnp.int32(first_step + i)))
        for i, feed in enumerate(itertools.islice(feeds, count))
    ]
    feeds.close()
    return found


SAMPLERS = {
    "train": RandomSampler((3, 4), 70, 16),
    "evaluate": SequentialSampler(70, 16),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("first_step", [0, 3, 9])
def test_both_loaders_give_the_same_batches(split, sampler, first_step):
    in_memory = batches(InMemoryLoader(split.arrays()), sampler, first_step, 8)
    decoded = batches(GrainLoader(split, num_workers=0), sampler, first_step, 8)
    for step, (a, b) in enumerate(zip(in_memory, decoded, strict=True), first_step):
        there = sampler.rows(step) >= 0
        assert a.keys() == b.keys() == {"image", "label"}
        for name in ("image", "label"):
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name][there], b[name][there])


@pytest.mark.parametrize("kind", ["memory", "grain"])
def test_a_run_goes_on_at_its_step(split, kind):
    if kind == "memory":
        loader = InMemoryLoader(split.arrays())
    else:
        loader = GrainLoader(split, num_workers=0)
    whole = batches(loader, SAMPLERS["train"], 0, 10)
    for first_step in (1, 4, 5, 9):
        rest = batches(loader, SAMPLERS["train"], first_step, 10 - first_step)
        for a, b in zip(whole[first_step:], rest, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])


def test_weights_make_sums_exact(split):
    labels = split.arrays()["label"]
    for loader in (InMemoryLoader(split.arrays()), GrainLoader(split, num_workers=0)):
        sampler = SAMPLERS["evaluate"]
        found = batches(loader, sampler, 0, sampler.steps_before(1))
        weights = [sampler.weights(step) for step in range(len(found))]
        total = sum(
            (batch["label"] * weight).sum()
            for batch, weight in zip(found, weights, strict=True)
        )
        assert total == labels.sum()
        assert sum(weight.sum() for weight in weights) == 70


def test_processes_share_every_batch(split):
    whole = batches(GrainLoader(split, num_workers=0), SAMPLERS["train"], 2, 4)
    parts = [
        batches(
            GrainLoader(split, num_workers=0, process_index=i, process_count=4),
            SAMPLERS["train"],
            2,
            4,
        )
        for i in range(4)
    ]
    for expected, *shares in zip(whole, *parts, strict=True):
        joined = np.concatenate([share["image"] for share in shares])
        np.testing.assert_array_equal(joined, expected["image"])
    three = GrainLoader(split, num_workers=0, process_index=0, process_count=3)
    with pytest.raises(UsageError, match=r"multiple of 3, the number .* got 16"):
        three.abstract_feed(SAMPLERS["train"])


def test_a_process_without_examples_gets_a_batch_of_nothing(split):
    sampler = SequentialSampler(5, 4)  # the last batch has one example
    part = split.part(0, 5)
    loader = GrainLoader(part, num_workers=0, process_index=1, process_count=2)
    last = batches(loader, sampler, 1, 1)[0]
    assert last["image"].shape == (2, 8, 8, 1)
    assert not last["image"].any()


def test_wrong_numbers_are_refused(split):
    with pytest.raises(UsageError, match="num_workers must be at least 0, got -1"):
        GrainLoader(split, num_workers=-1)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(split):
    sampler = SAMPLERS["train"]
    expected = batches(GrainLoader(split, num_workers=0), sampler, 3, 6)
    found = batches(GrainLoader(split, num_workers=2), sampler, 3, 6)
    for a, b in zip(expected, found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shapes_are_known_beforehand(split):
    sampler = SAMPLERS["train"]
    for loader in (InMemoryLoader(split.arrays()), GrainLoader(split, num_workers=0)):
        feeds = loader.feeds(sampler)
        found = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), next(feeds))
        feeds.close()
        shapes = loader.abstract_feed(sampler)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), shapes) == found


def test_nothing_moves_in_an_epoch_of_data_in_memory(split):
    loader = InMemoryLoader(split.arrays())
    feeds = loader.feeds(SAMPLERS["train"])
    step = jax.jit(lambda feed, i: (loader.batch(feed, i)["image"].sum(), i + 1))
    first, i = next(feeds), jnp.int32(0)
    _, i = step(first, i)
    with jax.transfer_guard("disallow"):
        for _ in range(SAMPLERS["train"].steps_before(1) - 1):
            _, i = step(next(feeds), i)


def test_the_loader_is_chosen_by_size(split, monkeypatch):
    splits = {"train": split, "test": split}
    assert split.num_bytes == 70 * (8 * 8 + 4)
    monkeypatch.setattr(loaders, "device_bytes", lambda: 4 * 2 * split.num_bytes)
    assert {type(x) for x in open_loaders(splits).values()} == {InMemoryLoader}
    monkeypatch.setattr(loaders, "device_bytes", lambda: 4 * 2 * split.num_bytes - 1)
    assert {type(x) for x in open_loaders(splits).values()} == {GrainLoader}
    forced = open_loaders(splits, mode="memory")
    assert {type(loader) for loader in forced.values()} == {InMemoryLoader}
    with pytest.raises(
        UsageError, match="must be 'auto', 'memory' or 'grain', got 'disk'"
    ):
        open_loaders(splits, mode="disk")


def test_memory_of_the_device_is_known():
    assert 1 << 28 < loaders.device_bytes() < 1 << 50


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
