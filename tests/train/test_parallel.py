"""However many devices share the work, the numbers are those of one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.train.test_loop import ONE_DEVICE, Regression, make_data, run
from train.config import TrainingConfig
from train.data import load
from train.data.config import DataConfig
from train.data.loaders import InMemoryLoader, Shuffled, GrainLoader
from train.parallel import (
    make_mesh,
    start_distributed,
    state_shardings,
)
from train.errors import UsageError
from train.optim.optimizer import OptimizerConfig
from train.program import Program
from train.tasks import classification, translation
from train.optim.techniques import TECHNIQUES

WIDTH = 64  # its kernel has as many elements as the smallest that is sharded


class Network(nnx.Module):
    """All that may go wrong: statistics of the batch, random masks, large arrays."""

    def __init__(self, rngs):
        # A bias in front of the norm would have a gradient of rounding errors alone.
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


def program(mesh, techniques=(), *, num_test=10, width=1, per_call=1, **config):
    task = Deep(OptimizerConfig(techniques=tricks, learning_rate=0.02))
    config = {"epochs": 1, "batch_size": 16, "log_every": 1} | config
    return Program(
        task,
        TrainingConfig(optimizer=task.optimizer, **config),
        train=InMemoryLoader(make_data(80), mesh),
        test=InMemoryLoader(make_data(num_test, seed=1), mesh),
        mesh=mesh,
        width=width,
        steps_per_call=per_call,
    )


def assert_same_run(found, expected, **tolerance):
    """Records of epochs and steps, and networks with all their statistics."""
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, **tolerance)
    assert_same_networks(found[2], expected[2], **tolerance)


def assert_same_networks(found, expected, rel):
    for a, b in zip(found, expected, strict=True):
        chex.assert_trees_all_close(a.params, b.params, rtol=rel, atol=1e-6)
        a, b = (without_keys(state.model_state) for state in (a, b))
        chex.assert_trees_all_close(a, b, rtol=rel, atol=1e-6)


def without_keys(tree):
    is_key = functools.partial(jax.dtypes.issubdtype, b=jax.dtypes.prng_key)
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if is_key(x.dtype) else x, tree
    )


@functools.cache
def on_one_device(tricks, accumulate=1):
    return run(program(ONE_DEVICE, tricks, accumulate=accumulate))


COMBINATIONS = [(), *((trick,) for trick in TECHNIQUES)]


@pytest.mark.parametrize("tricks", COMBINATIONS, ids="+".join)
def test_devices_that_share_a_batch_give_what_one_gives(tricks):
    assert make_mesh().shape == {"seed": 1, "data": 8}
    found = run(program(make_mesh(), tricks))
    assert_same_run(found, on_one_device(tricks), rel=1e-4)


@pytest.mark.parametrize("tricks", COMBINATIONS, ids="+".join)
def test_sharded_parameters_are_the_same_parameters(tricks):
    found = run(program(make_mesh(), tricks, shard_params=True))
    assert_same_run(found, on_one_device(tricks), rel=1e-4)
    (state,) = found[2]
    large = [x for x in jax.tree.leaves(state) if x.size == WIDTH * WIDTH]
    # The kernel and its momentum at least.
    assert len(large) >= 2
    for array in large:
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == (WIDTH, WIDTH // 8)
    small = state.params["model"]["first"]["kernel"]
    assert small.sharding.is_fully_replicated


def test_accumulated_parts_are_shared_by_devices_too():
    tricks = ("perturbed_unit_step",)
    for shard in (False, True):
        config = {"grad_accum": 2, "shard_params": shard}
        found = run(program(make_mesh(), tricks, **config))
        assert_same_run(found, on_one_device(tricks, accumulate=2), rel=1e-4)


def test_each_device_computes_its_part_of_a_batch_only():
    def operations(mesh, width=1):
        text = program(mesh, batch_size=80, width=width)._compiled.as_text()
        # Shapes of the hidden activations in one device's program.
        shapes = set(re.findall(rf"f32\[([\d,]+),{WIDTH}\]\S* tanh\(", text))
        return shapes, "all-reduce" in text

    assert operations(ONE_DEVICE) == ({"80"}, False)
    assert operations(make_mesh()) == ({"10"}, True)
    # Two devices for two of eight seeds.
    assert operations(make_mesh(4), width=8) == ({"2,40"}, True)


@pytest.mark.parametrize(("sharers", "per_call"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("tricks", [("scale_by_random",), ("perturbed_unit_step",)], ids="+".join)
def test_seeds_beside_each_other_are_those_one_after_the_other(
    tricks, sharers, per_call
):
    count = 8 // sharers
    mesh = make_mesh(count)
    assert mesh.shape == {"seed": count, "data": sharers}
    compiled = program(mesh, tricks, width=8, per_call=per_call)
    epochs, _, (stacked,) = run(compiled, seeds=range(8))
    # Each device has its seeds alone.
    for array in jax.tree.leaves((stacked.params, stacked.opt_state)):
        assert {s.data.shape[0] for s in array.addressable_shards} == {8 // count}
    alone = on_one_device_from_eight_seeds(tricks)
    for a, b in zip(epochs, alone[0], strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-4)
    separate = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(8)]
    assert_same_networks(separate, alone[2], rel=1e-4)


@functools.cache
def on_one_device_from_eight_seeds(tricks):
    return run(program(ONE_DEVICE, tricks), seeds=range(8))


@pytest.mark.parametrize("num_test", [1, 83])
@pytest.mark.parametrize("seeds", [1, 4])
def test_evaluation_on_many_devices_counts_every_example_once(num_test, seeds):
    compiled = program(make_mesh(seeds), num_test=num_test, width=seeds)
    state = compiled.init(range(seeds))
    alone = program(ONE_DEVICE, num_test=num_test)
    for seed, totals in enumerate(compiled.evaluate(state)):
        (expected,) = alone.evaluate(alone.init((seed,)))
        assert totals["count"] == expected["count"] == num_test
        assert totals["error"] == pytest.approx(expected["error"], rel=1e-5)


def test_a_stream_is_cut_over_devices_and_is_the_resident_batch():
    split = load("digits").split("train").part(0, 70)
    mesh = make_mesh()
    resident = InMemoryLoader(split.arrays(), mesh)
    stream = GrainLoader(split, mesh, num_workers=0)
    order = Shuffled((3, 4), 70, 16)
    make = jax.jit(resident.batch)
    feeds = resident.feeds(order, 2), stream.feeds(order, 2)
    for step, feed, batch in zip(range(2, 8), *feeds, strict=False):
        assert batch["image"].sharding.spec == P("data")
        shards = batch["image"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(2, 8, 8, 1)}
        chex.assert_trees_all_equal(make(feed, jnp.int32(step)), batch)
    feeds[1].close()


def test_where_arrays_of_a_state_lie():
    mesh = make_mesh(2)
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

    def specs(state, **options):
        found = state_shardings(state, mesh, **options)
        assert all(sharding.mesh == mesh for sharding in found.values())
        return {name: tuple(sharding.spec) for name, sharding in found.items()}

    whole = specs(state, stacked=False, shard_params=False)
    assert whole == {name: (None,) * x.ndim for name, x in state.items()}
    expected = whole | {
        "large": (None, "data"),
        "tall": ("data", None),
        "square": (None, "data"),
        "second_best": (None, "data"),
    }
    assert specs(state, stacked=False, shard_params=True) == expected
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((6, *x.shape), x.dtype), state
    )
    found = specs(stacked, stacked=True, shard_params=True)
    assert found == {name: ("seed", *spec) for name, spec in expected.items()}


def test_devices_that_seeds_cannot_share_are_refused():
    with pytest.raises(UsageError, match="8 devices cannot be shared evenly by 3"):
        make_mesh(3)


def test_classification_is_the_same_on_many_devices():
    config = classification.ClassificationConfig(epochs=1, batch_size=16)
    assert_same_step(classification, config)


@pytest.mark.slow
def test_translation_is_the_same_on_many_devices():
    config = translation.TranslationConfig(
        data=DataConfig(dataset="digit_scenes"),
        epochs=1,
        batch_size=8,
        generator="unet64_small",
        discriminator="pixelgan",
    )
    assert_same_step(translation, config)


def assert_same_step(module, config):
    task, dataset = module.open_task(config)
    splits = [dataset.split(name).part(0, 16).arrays() for name in ("train", "test")]
    states = []
    for mesh in (ONE_DEVICE, make_mesh()):
        train, test = (InMemoryLoader(arrays, mesh) for arrays in splits)
        compiled = Program(task, config, train=train, test=test, mesh=mesh)
        state = compiled.init((0,))
        states.append(compiled.train(state, next(compiled.feeds((0,), 0)), 1))
    one, many = states
    # Losses, norms of gradients and updates, and the statistics of BatchNorm.
    chex.assert_trees_all_close(many.log, one.log, rtol=1e-3)
    one, many = (without_keys(state.model_state) for state in states)
    chex.assert_trees_all_close(many, one, rtol=1e-3, atol=1e-5)


LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def joined(monkeypatch):
    """What JAX is asked to join, outside of any launcher."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("name", "value", "several"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("SLURM_NTASKS", "2", False),  # in an allocation, but not started by srun
        ("OMPI_COMM_WORLD_SIZE", "16", True),
        ("OMPI_COMM_WORLD_SIZE", "", False),
        ("TPU_WORKER_HOSTNAMES", "host0,host1", True),
        ("TPU_WORKER_HOSTNAMES", "localhost", False),
    ],
)
def test_launchers_are_recognised(monkeypatch, joined, name, value, several):
    start_distributed(None, None, None)
    assert joined == []
    monkeypatch.setenv(name, value)
    start_distributed(None, None, None)
    assert joined == [(None, None, None)] * several


def test_arguments_join_processes_without_a_launcher(joined):
    start_distributed("host:1234", 2, 0)
    assert joined == [("host:1234", 2, 0)]


@pytest.mark.parametrize(
    "arguments", [("host:1234", None, None), (None, 2, 0), ("host:1234", 2, None)]
)
def test_some_of_the_arguments_are_not_enough(joined, arguments):
    with pytest.raises(UsageError, match="give all three, or none"):
        start_distributed(*arguments)
    assert joined == []


@pytest.mark.parametrize("coordinator", ["host", "host:", "host:port", ":"])
def test_a_coordinator_is_a_host_and_a_port(joined, coordinator):
    with pytest.raises(UsageError, match=f"HOST:PORT, got '{coordinator}'"):
        start_distributed(coordinator, 2, 0)
    assert joined == []


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_jax_refuses_is_said_in_a_line(monkeypatch, kind):
    def initialize(*arguments):
        raise kind("the port is taken")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UsageError, match=r"cannot join the .*: the port is taken"):
        start_distributed("localhost:1234", 2, 0)
