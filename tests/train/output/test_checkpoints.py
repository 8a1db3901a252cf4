"""Checkpoints are whole or absent, restored bit for bit, and checked when read."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tests.forked import processes
from tests.shared import disk_of
from train.output import checkpoints
from train.output.checkpoints import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_steps,
    find_checkpoint,
)

FLIPS = 3  # in each file

LIMIT = 600  # seconds for what takes a few on an idle machine


class State(NamedTuple):
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    step: jax.Array
    key: jax.Array
    log: Any


def state_of(step, width=3):
    """Returns trees with all that a state may hold, and other numbers at each step."""
    key = jax.random.fold_in(jax.random.key(0), step)
    kernel = jax.random.normal(key, (8, width))
    params = {
        "generator": {"layers": {0: {"w": kernel}, 1: {"w": -kernel}}, "none": {}},
        "critic": {"a/b.c": jnp.asarray(kernel, jnp.bfloat16)},
    }
    tx = optax.chain(optax.clip(1.0), optax.add_noise(0.1, 0.5, key), optax.adam(0.1))
    first = State(
        params=params,
        model_state={"count": jnp.arange(step, step + 5), "seen": jnp.array([True])},
        opt_state=tx.init(params),
        ema=None,
        step=jnp.int32(step),
        key=key,
        log={"loss": jnp.float32(step) / 3, "ratio": jnp.float32(jnp.nan)},
    )
    keys = jax.random.split(key, 3)
    return first, first._replace(opt_state=(), ema=params, key=keys, log={})


def abstract(state, sharding_of=lambda leaf: leaf.sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), state
    )


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def content(leaf):
    data = jax.random.key_data(leaf) if is_key(leaf) else leaf
    return leaf.dtype, leaf.shape, np.asarray(data).tobytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(x, jax.Array)
        assert content(x) == content(y)


def about(step):
    return {"seed": 5, "epochs": [{"loss": 1 / 3, "step": step}]}


def save(folder, *steps, width=3):
    writer = CheckpointWriter(folder)
    for step in steps:
        writer.save(step, state_of(step, width), about(step))


def restore(folder, *, warn=pytest.fail, width=3, like=None):
    found = find_checkpoint(folder, warn=warn, identity={"seed": 5})
    if found is None:
        return None
    assert found.about == {"step": found.step, **about(found.step)}
    return found.step, found.read(state_of(0, width) if like is None else like)


def assert_restores(folder, step, *, warn=pytest.fail, width=3):
    found, state = restore(folder, warn=warn, width=width)
    assert found == step
    assert_same(state, state_of(step, width))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new" / "folder") is None


def test_the_newest_is_restored_bit_for_bit(tmp_path):
    save(tmp_path, 3, 20, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"20", "100"}
    assert checkpoint_steps(tmp_path) == [20, 100]
    for like in (state_of(0), abstract(state_of(0))):
        step, state = restore(tmp_path, like=like)
        assert step == 100
        assert_same(state, state_of(100))


def test_the_last_step_is_not_saved_again(tmp_path):
    save(tmp_path, 1, 1, 2, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]
    CheckpointWriter(tmp_path, saved=2).save(2, state_of(3), about(3))
    assert_restores(tmp_path, 2)


def test_later_steps_are_removed_when_training_has_gone_back(tmp_path):
    save(tmp_path, 4, 5)
    CheckpointWriter(tmp_path, saved=1).save(3, state_of(3), about(3))
    assert checkpoint_steps(tmp_path) == [3]
    assert_restores(tmp_path, 3)


def tree_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_to_read_changes_nothing(tmp_path):
    save(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    before = tree_of(tmp_path)
    restore(tmp_path)
    assert tree_of(tmp_path) == before


def test_one_that_is_removed_while_it_is_looked_at_is_passed_over(
    tmp_path, monkeypatch
):
    save(tmp_path, 1, 2)
    steps = [*checkpoint_steps(tmp_path), 3]  # a run in progress has removed it
    monkeypatch.setattr(checkpoints, "checkpoint_steps", lambda folder: steps)
    assert_restores(tmp_path, 2)


@pytest.mark.parametrize(
    ("source", "target", "seed", "problem"),
    [("2", "30", 5, "step"), ("2", "3", 4, "step"), ("2", "2", 4, "seed")],
)
def test_a_checkpoint_of_another_run_or_step_is_not_taken(
    tmp_path, source, target, seed, problem
):
    save(tmp_path, 1, 2)
    (tmp_path / "1").rename(tmp_path / "kept")
    if source != target:
        (tmp_path / source).rename(tmp_path / target)
    message = rf"{target} is damaged \(it was saved for another {problem}\)"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path, warn=pytest.fail, identity={"seed": seed})


def test_a_state_may_be_donated_when_it_is_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def train(arrays):
        return jax.tree.map(lambda x: x * 2, arrays)

    state = jax.random.normal(jax.random.key(0), (4, 500_000))
    state = {"a": jnp.array(state), "b": jnp.array(state)}
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    CheckpointWriter(tmp_path).save(0, state, about(0))
    for _ in range(5):
        state = train(state)
    _, actual = restore(tmp_path, like=abstract(state))
    assert_same(actual, jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[:1],
        lambda state: (*state, {"more": jnp.ones(2)}),
        lambda state: jax.tree.map(lambda x: x[None], state),
        lambda state: jax.tree.map(
            lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, state
        ),
    ],
    ids=["less", "more", "shapes", "dtypes"],
)
def test_a_checkpoint_of_another_program_is_refused(tmp_path, change, capfd):
    save(tmp_path, 1, 2)
    message = r"2 is from another program: .* in the checkpoint and .* in this run"
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, like=change(state_of(0)))
    assert capfd.readouterr() == ("", "")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damages(path):
    """Yields the bytes of a file damaged in many ways; None is a removed file."""
    whole = path.read_bytes()
    rng = random.Random(str(path.name))
    for _ in range(FLIPS):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    yield from (whole[: len(whole) // 2], b"", None)


@pytest.mark.slow
def test_any_damage_to_any_file_is_seen(tmp_path, capfd):
    """Or does no harm: some files of Orbax hold nothing that matters."""
    save(tmp_path, 1, 2)
    seen = {}
    for path in files_of(tmp_path / "2"):
        whole = path.read_bytes()
        for damage in damages(path):
            path.unlink() if damage is None else path.write_bytes(damage)
            lines = []
            step, state = restore(tmp_path, warn=lines.append)
            assert_same(state, state_of(step))
            seen.setdefault(path.name, set()).add(step == 1)
            assert len(lines) == (step == 1)
            path.write_bytes(whole)
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert {name for name, damaged in seen.items() if damaged != {True}} == harmless
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["about.json", "digests.json"])
@given(data=st.data())
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
)
def test_any_change_of_the_json_files_is_seen(saved, name, data):
    path = saved / "2" / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    place = data.draw(st.integers(0, len(changed) - 1))
    length = data.draw(st.integers(0, 30))
    changed[place : place + length] = data.draw(st.binary(max_size=4))
    try:
        path.write_bytes(changed)
        lines = []
        found = find_checkpoint(saved, warn=lines.append, identity={"seed": 5})
        same = name == "digests.json" and as_json(changed) == as_json(whole)
        assert found.step == (2 if same or changed == whole else 1)
        assert all("\n" not in line for line in lines)
    finally:
        path.write_bytes(whole)


def as_json(content):
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize("content", ["{}", "[]", "3", "[" * 100_000])
def test_digests_that_are_none_are_seen(saved, content):
    path = saved / "2" / "digests.json"
    whole = path.read_text()
    try:
        path.write_text(content)
        lines = []
        assert restore(saved, warn=lines.append)[0] == 1
        assert len(lines) == 1
    finally:
        path.write_text(whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2)
    return folder


def flip_in_parameters(folder):
    path = max(files_of(folder), key=lambda path: path.stat().st_size)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def test_a_damaged_checkpoint_is_skipped_and_replaced(tmp_path):
    save(tmp_path, 1, 2)
    flip_in_parameters(tmp_path / "2")
    lines = []
    assert_restores(tmp_path, 1, warn=lines.append)
    assert len(lines) == 1
    assert f"checkpoint {tmp_path / '2'} is damaged" in lines[0]
    assert "going on from step 1" in lines[0]
    assert (tmp_path / "2").exists()  # until training has come further
    CheckpointWriter(tmp_path, saved=1).save(2, state_of(2), about(2))
    assert_restores(tmp_path, 2)


def test_all_are_damaged(tmp_path):
    save(tmp_path, 1, 2)
    flip_in_parameters(tmp_path / "1")
    flip_in_parameters(tmp_path / "2")
    message = r"2 is damaged .*1 is damaged .*no other: put back a copy"
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert_restores(tmp_path, 1)
    save(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}


def fail_to_save(folder, num_bytes):
    writer = CheckpointWriter(folder)
    message = r"cannot write a checkpoint to .*File too large.*make room there"
    with disk_of(num_bytes), pytest.raises(CheckpointError, match=message):
        writer.save(3, state_of(3, width=1000), about(3))
    assert checkpoint_steps(folder) == [1, 2]


@pytest.mark.parametrize("num_bytes", [100, 20_000], ids=["metadata", "arrays"])
@pytest.mark.slow
def test_a_disk_is_full_while_a_checkpoint_is_written(tmp_path, num_bytes):
    save(tmp_path, 1, 2, width=1000)
    # In its own process, which ends: no thread waits for ever.
    process = processes.Process(target=fail_to_save, args=(tmp_path, num_bytes))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    assert_restores(tmp_path, 2, width=1000)
    save(tmp_path, 3, width=1000)
    assert_restores(tmp_path, 3, width=1000)


def test_a_full_disk_is_seen_before_a_checkpoint_is_written(
    tmp_path, monkeypatch, capfd
):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"cannot write a checkpoint to .* MB to write, 0.0 MB free"
    writer = CheckpointWriter(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        writer.save(2, state_of(2), about(2))
    monkeypatch.undo()
    writer.save(2, state_of(2), about(2))
    assert_restores(tmp_path, 2)
    assert capfd.readouterr() == ("", "")


def test_a_folder_cannot_be_written(tmp_path):
    folder = tmp_path / "file"
    folder.touch()
    with pytest.raises(
        CheckpointError, match=r"cannot write .* make the folder writable"
    ):
        CheckpointWriter(folder)
    with pytest.raises(
        CheckpointError, match=r"cannot write .* make the folder writable"
    ):
        CheckpointWriter(folder / "below")


def test_a_folder_is_gone(tmp_path):
    writer = CheckpointWriter(tmp_path / "run")
    writer.save(1, state_of(1), about(1))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.save(2, state_of(2), about(2))


def test_an_error_of_another_process_is_not_one_of_the_disk(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("another task died")

    monkeypatch.setattr(writer._writer, "save", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another task died"):
        writer.save(2, state_of(2), about(2))


def one_device(leaf):
    return SingleDeviceSharding(jax.devices()[0])


def sharded(leaf):
    """Shards over eight devices along an axis that they divide."""
    mesh = Mesh(np.array(jax.devices()), "data")
    spec = P("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else P()
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize(
    ("before", "after"),
    [(one_device, sharded), (sharded, one_device), (sharded, sharded)],
)
def test_a_state_is_restored_to_the_shardings_asked_for(tmp_path, before, after):
    state = jax.tree.map(lambda x: jax.device_put(x, before(x)), state_of(1))
    like = abstract(state, after)
    CheckpointWriter(tmp_path).save(1, state, about(1))
    _, actual = restore(tmp_path, like=like)
    assert_same(actual, state_of(1))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def save_until_killed(folder, count):
    """Saves, and kills its own process before the change `count` of the folder."""
    changes = itertools.count(1)

    def kill(event, arguments):
        if event == "open":
            path, _, flags = arguments
            paths = (path,) if flags & WRITES else ()
        else:
            paths = arguments[:2] if event in CHANGES else ()
        is_change = any(str(path).startswith(str(folder)) for path in paths)
        if is_change and next(changes) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = CheckpointWriter(folder)
    sys.addaudithook(kill)
    writer.save(3, state_of(3), about(3))


@pytest.mark.slow
def test_a_process_killed_at_any_change_leaves_whole_checkpoints(tmp_path):
    save(tmp_path / "before", 1, 2)
    steps, left_over = [], 0
    for count in itertools.count(1):
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "before", folder)
        process = processes.Process(target=save_until_killed, args=(folder, count))
        process.start()
        process.join()
        left_over += any("tmp" in path.name for path in folder.iterdir())
        step, state = restore(folder)
        assert_same(state, state_of(step))
        steps.append(step)
        save(folder, step + 1)
        assert_restores(folder, step + 1)
        assert {path.name for path in folder.iterdir()} == {str(step), str(step + 1)}
        if process.exitcode == 0:  # it ended before so many changes
            break
        assert process.exitcode == -signal.SIGKILL
    # The new checkpoint is there from one change on.
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}
    assert count > 10
    assert left_over > 0


# Each of two processes runs it, with its own two devices.
PROGRAM = """
import pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from train.output.checkpoints import (
    CheckpointWriter, checkpoint_steps, find_checkpoint
)

port, index, folder, *steps = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
mesh = jax.make_mesh((4,), ("data",))

def array(step, shape, spec):
    whole = np.random.default_rng(step).normal(size=shape).astype(np.float32)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(shape, sharding, lambda index: whole[index])

def state_of(step):
    key = jax.jit(jax.random.key, out_shardings=NamedSharding(mesh, P()))(step)
    return {
        "sharded": array(step, (8, 3), P("data")),
        "replicated": array(step, (5, 3), P()),
        "key": key,
    }

def content(state):
    state = state | {"key": jax.random.key_data(state["key"])}
    shards = [shard for x in jax.tree.leaves(state) for shard in x.addressable_shards]
    return [(str(shard.index), np.asarray(shard.data).tobytes()) for shard in shards]

folder = pathlib.Path(folder)
if not steps:
    found = find_checkpoint(folder, warn=print, identity={})
    step, state = found.step, found.read(state_of(0))
    assert content(state) == content(state_of(step))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, state_of(0)
    )
    print("restored", step)
    steps = [step + 1]
writer = CheckpointWriter(folder)
for step in map(int, steps):
    writer.save(step, state_of(step), {})
# The first process removes old checkpoints, maybe when the other has gone on.
multihost_utils.sync_global_devices("saved")
print(checkpoint_steps(folder))
"""


def run_two_processes(folder, *steps):
    """Returns the lines that each prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (port, i, folder, *steps))],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return [[x for x in out.splitlines() if "Gloo" not in x] for out, _ in outputs]


@pytest.mark.slow
def test_two_processes_save_and_restore(tmp_path):
    assert run_two_processes(tmp_path, 1, 2, 2, 3) == [["[2, 3]"]] * 2
    flip_in_parameters(tmp_path / "3")
    for warning, restored, steps in run_two_processes(tmp_path):
        assert f"checkpoint {tmp_path / '3'} is damaged" in warning
        assert (restored, steps) == ("restored 2", "[2, 3]")
    # One process reads it as well.
    whole = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)
    like = {
        "sharded": jnp.zeros((8, 3)),
        "replicated": jnp.zeros((5, 3)),
        "key": jax.random.key(0),
    }
    found = find_checkpoint(tmp_path, warn=pytest.fail, identity={})
    assert found.step == 3
    state = found.read(like)
    np.testing.assert_array_equal(state["sharded"], whole)
    assert content(state["key"]) == content(jax.random.key(3))
