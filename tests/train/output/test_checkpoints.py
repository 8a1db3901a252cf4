"""Checkpoints are whole or absent, restored bit for bit, and checked when read."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tests.shared import disk_of
from train.output.checkpoints import CheckpointError, Checkpoints

FLIPS = 3  # in each file

# Its processes start at once, with everything imported.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train.output.checkpoints"])


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


def save(folder, *steps, width=3):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step, width))


def restore(folder, *, warn=pytest.fail, width=3):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state_of(0, width), warn=warn)


def assert_restores(folder, step, *, warn=pytest.fail, width=3):
    found, state = restore(folder, warn=warn, width=width)
    assert found == step
    assert_same(state, state_of(step, width))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new" / "folder") is None


def test_the_newest_is_restored_bit_for_bit(tmp_path):
    save(tmp_path, 3, 20, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"20", "100"}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [20, 100]
        for like in (state_of(0), abstract(state_of(0))):
            step, state = checkpoints.restore(like, warn=pytest.fail)
            assert step == 100
            assert_same(state, state_of(100))


def test_a_save_while_another_is_written_and_the_same_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 1, 2, 2):
            checkpoints.save(step, state_of(step, width=10_000))
        checkpoints.wait()
        checkpoints.save(2, state_of(3, width=10_000))
        assert checkpoints.steps() == [1, 2]
    assert_restores(tmp_path, 2, width=10_000)


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def train(arrays):
        return jax.tree.map(lambda x: x * 2, arrays)

    state = jax.random.normal(jax.random.key(0), (4, 500_000))
    state = {"a": jnp.array(state), "b": jnp.array(state)}
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        for _ in range(5):
            state = train(state)
        _, actual = checkpoints.restore(abstract(state), warn=pytest.fail)
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
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"2 is from another program: .* in the checkpoint and .* in this run",
        ),
    ):
        checkpoints.restore(change(state_of(0)), warn=pytest.fail)
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
    with Checkpoints(tmp_path) as checkpoints:
        for path in files_of(tmp_path / "2"):
            whole = path.read_bytes()
            for damage in damages(path):
                path.unlink() if damage is None else path.write_bytes(damage)
                lines = []
                step, state = checkpoints.restore(state_of(0), warn=lines.append)
                assert_same(state, state_of(step))
                seen.setdefault(path.name, set()).add(step == 1)
                assert len(lines) == (step == 1)
                path.write_bytes(whole)
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert {name for name, damaged in seen.items() if damaged != {True}} == harmless
    assert capfd.readouterr() == ("", "")


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
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.restore(state_of(0), warn=lines.append)
        checkpoints.save(2, state_of(2))
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


def fail_to_save(folder, num_bytes, later):
    checkpoints = Checkpoints(folder)
    with disk_of(num_bytes):
        checkpoints.save(3, state_of(3, width=1000))
        message = r"cannot write a checkpoint to .*File too large.*make room there"
        with pytest.raises(CheckpointError, match=message):
            later(checkpoints)
        with contextlib.suppress(CheckpointError):  # more may have failed
            checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def save_the_next(checkpoints):
    checkpoints.save(4, state_of(4, width=1000))


@pytest.mark.parametrize("num_bytes", [100, 20_000], ids=["metadata", "arrays"])
@pytest.mark.parametrize("later", [Checkpoints.wait, Checkpoints.close, save_the_next])
@pytest.mark.slow
def test_a_disk_is_full_while_a_checkpoint_is_written(tmp_path, num_bytes, later):
    save(tmp_path, 1, 2, width=1000)
    # In its own process: Orbax ends its threads with unraisable exceptions.
    process = processes.Process(target=fail_to_save, args=(tmp_path, num_bytes, later))
    process.start()
    process.join()
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
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(2, state_of(2))
        monkeypatch.undo()
        checkpoints.save(2, state_of(2))
    assert_restores(tmp_path, 2)
    assert capfd.readouterr() == ("", "")


def test_a_folder_cannot_be_written(tmp_path):
    folder = tmp_path / "file"
    folder.touch()
    with pytest.raises(
        CheckpointError, match=r"cannot write .* make the folder writable"
    ):
        Checkpoints(folder)
    with pytest.raises(
        CheckpointError, match=r"cannot write .* make the folder writable"
    ):
        Checkpoints(folder / "below")


def test_a_folder_is_gone(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match="cannot write"):
            checkpoints.save(2, state_of(2))


def test_an_error_of_another_process_is_not_one_of_the_disk(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))

        def wait():
            raise jax.errors.JaxRuntimeError("another task died")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "wait_until_finished", wait)
            with pytest.raises(jax.errors.JaxRuntimeError, match="another task died"):
                checkpoints.save(2, state_of(2))
    assert_restores(tmp_path, 1)


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
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _, actual = checkpoints.restore(like, warn=pytest.fail)
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

    with Checkpoints(folder) as checkpoints:
        sys.addaudithook(kill)
        checkpoints.save(3, state_of(3))


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
from jax.sharding import NamedSharding, PartitionSpec as P
from train.output.checkpoints import Checkpoints

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

with Checkpoints(pathlib.Path(folder)) as checkpoints:
    if not steps:
        step, state = checkpoints.restore(state_of(0), warn=print)
        assert content(state) == content(state_of(step))
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
            lambda x: x.sharding, state_of(0)
        )
        print("restored", step)
        steps = [step + 1]
    for step in map(int, steps):
        checkpoints.save(step, state_of(step))
    checkpoints.wait()
    print(checkpoints.steps())
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
        outputs = [process.communicate(timeout=120) for process in started]
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
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore(like, warn=pytest.fail)
    assert step == 3
    np.testing.assert_array_equal(state["sharded"], whole)
    assert content(state["key"]) == content(jax.random.key(3))
