"""However many devices share the work, the numbers are the same as on one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import models
from tests.train.small_tasks import (
    ONE_DEVICE,
    Recorder,
    Regression,
    make_program,
    one_step,
    without_keys,
)
from train.data import load
from train.data.config import DataConfig
from train.data.loaders import GrainLoader, InMemoryLoader
from train.data.samplers import RandomSampler
from train.optim.techniques import TECHNIQUES
from train.parallel import make_mesh, state_shardings
from train.program import Program
from train.run import train_seed
from train.tasks import open_task
from train.tasks.classification import ClassificationConfig
from train.tasks.translation import TranslationConfig

WIDTH = 64  # its kernel has as many elements as the smallest that is sharded


class Network(models.Network):
    """All that may go wrong: statistics of the batch, random masks, large arrays."""

    def __init__(self, rngs):
        # A bias before the norm would have a gradient of rounding errors alone.
        self.first = nnx.Linear(2, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(jnp.tanh(self.norm(self.first(x))))
        return self.last(jnp.tanh(self.second(x)))


class Deep(Regression):
    def create_networks(self, rngs):
        return {"model": Network(rngs)}


def deep_program(mesh, techniques=(), *, num_test=10, **config):
    config = {"epochs": 1, "batch_size": 16, "log_every": 1} | config
    return make_program(
        Deep(),
        num_train=80,
        num_test=num_test,
        mesh=mesh,
        config=config,
        techniques=techniques,
        learning_rate=0.02,
        weight_decay=5e-4,
    )


def train(program, seed=0):
    recorder = Recorder()
    state, _ = train_seed(program, seed, recorder)
    return recorder.epochs + recorder.steps, state


def assert_same_run(found, expected, **tolerance):
    """Compares records of epochs and steps, and networks with all their state."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, **tolerance)
    a, b = found[1], expected[1]
    chex.assert_trees_all_close(a.params, b.params, rtol=tolerance["rel"], atol=1e-6)
    a, b = (without_keys(state.model_state) for state in (a, b))
    chex.assert_trees_all_close(a, b, rtol=tolerance["rel"], atol=1e-6)


@functools.cache
def on_one_device(techniques, grad_accum=1):
    return train(deep_program(ONE_DEVICE, techniques, grad_accum=grad_accum))


# One of each number of gradients, and the largest state; the others are slow.
QUICK = ("perturbed_unit_step", "barzilai_borwein_step")
COMBINATIONS = [
    (),
    *(
        pytest.param((name,), marks=() if name in QUICK else pytest.mark.slow)
        for name in TECHNIQUES
    ),
]


@pytest.mark.parametrize("techniques", COMBINATIONS, ids="+".join)
def test_devices_that_share_a_batch_give_what_one_gives(techniques):
    assert make_mesh().shape == {"data": 8}
    found = train(deep_program(make_mesh(), techniques))
    assert_same_run(found, on_one_device(techniques), rel=1e-4)


@pytest.mark.parametrize("techniques", COMBINATIONS, ids="+".join)
@pytest.mark.slow
def test_sharded_parameters_are_the_same_parameters(techniques):
    found = train(deep_program(make_mesh(), techniques, shard_params=True))
    assert_same_run(found, on_one_device(techniques), rel=1e-4)
    state = found[1]
    large = [x for x in jax.tree.leaves(state) if x.size == WIDTH * WIDTH]
    # The kernel and its momentum at least.
    assert len(large) >= 2
    for array in large:
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == (WIDTH, WIDTH // 8)
    small = state.params["model"]["first"]["kernel"]
    assert small.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "shard_params", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_accumulated_parts_are_shared_by_devices_too(shard_params):
    techniques = ("perturbed_unit_step",)
    config = {"grad_accum": 2, "shard_params": shard_params}
    found = train(deep_program(make_mesh(), techniques, **config))
    assert_same_run(found, on_one_device(techniques, grad_accum=2), rel=1e-4)


def test_each_device_computes_its_part_of_a_batch_only():
    def operations(mesh):
        text = deep_program(mesh, batch_size=80).train_step.as_text()
        # Shapes of the hidden activations in one device's program.
        shapes = set(re.findall(rf"f32\[([\d,]+),{WIDTH}\]\S* tanh\(", text))
        return shapes, "all-reduce" in text

    assert operations(ONE_DEVICE) == ({"80"}, False)
    assert operations(make_mesh()) == ({"10"}, True)


@pytest.mark.parametrize("num_test", [1, 83])
def test_evaluation_on_many_devices_counts_every_example_once(num_test):
    found, expected = (
        program.evaluate(program.init_state(3))
        for program in (
            deep_program(make_mesh(), num_test=num_test),
            deep_program(ONE_DEVICE, num_test=num_test),
        )
    )
    assert found["count"] == expected["count"] == num_test
    assert found["error"] == pytest.approx(expected["error"], rel=1e-5)


def test_a_stream_is_sharded_over_devices_and_is_the_batch_in_memory():
    split = load("digits").split("train").part(0, 70)
    mesh = make_mesh()
    in_memory = InMemoryLoader(split.arrays(), mesh)
    stream = GrainLoader(split, mesh, num_workers=0)
    sampler = RandomSampler((3, 4), 70, 16)
    make = jax.jit(in_memory.batch)
    feeds = in_memory.feeds(sampler, 2), stream.feeds(sampler, 2)
    for step, feed, batch in zip(range(2, 8), *feeds, strict=False):
        assert batch["image"].sharding.spec == P("data")
        shards = batch["image"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(2, 8, 8, 1)}
        chex.assert_trees_all_equal(make(feed, jnp.int32(step)), batch)
    feeds[1].close()


def test_where_arrays_of_a_state_lie():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    shapes = {
        "large": (64, 128),
        "tall": (256, 64),
        "square": (64, 64),
        "indivisible": (99, 99),
        "second_best": (99, 64),
        "small": (4095,),
        "scalar": (),
    }
    state = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    state["keys"] = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4096))

    def specs(shard_params):
        found = state_shardings(state, mesh, shard_params=shard_params)
        assert all(sharding.mesh == mesh for sharding in found.values())
        return {name: tuple(sharding.spec) for name, sharding in found.items()}

    whole = specs(False)
    assert whole == {name: (None,) * x.ndim for name, x in state.items()}
    assert specs(True) == whole | {
        "large": (None, "data"),
        "tall": ("data", None),
        "square": (None, "data"),
        "second_best": (None, "data"),
    }


@pytest.mark.slow
def test_classification_is_the_same_on_many_devices():
    assert_same_step(ClassificationConfig(epochs=1, batch_size=16))


@pytest.mark.slow
def test_translation_is_the_same_on_many_devices():
    config = TranslationConfig(
        data=DataConfig(dataset="digit_scenes"),
        epochs=1,
        batch_size=8,
        generator="unet64_small",
        discriminator="pixelgan",
    )
    assert_same_step(config)


def assert_same_step(config):
    task, dataset = open_task(config)
    splits = [dataset.split(name).part(0, 16).arrays() for name in ("train", "test")]
    states = []
    for mesh in (ONE_DEVICE, make_mesh()):
        train, test = (InMemoryLoader(arrays, mesh) for arrays in splits)
        loaders = {"train_loader": train, "eval_loader": test}
        states.append(one_step(Program(task, config, mesh=mesh, **loaders)))
    one, many = states
    # Losses, norms of gradients and updates, and the statistics of BatchNorm.
    chex.assert_trees_all_close(many.log, one.log, rtol=1e-3)
    one, many = (without_keys(state.model_state) for state in (one, many))
    chex.assert_trees_all_close(many, one, rtol=1e-3, atol=1e-5)
