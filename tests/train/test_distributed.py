"""Two processes train to the numbers of one, and end together."""

import contextlib
import json
import signal
from functools import partial

import numpy as np
import pytest
from flax import nnx

import models
from tests import failpoints
from tests.shared import free_port
from tests.train.small_runs import (
    EPOCHS,
    LAST_STEP,
    SmallNetwork,
    last_state,
    last_step,
    lose_weights,
    records,
    train,
    train_part,
    train_with_fast_clock,
)
from tests.train.small_tasks import without_seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@contextlib.contextmanager
def pair(work, folder, scratch, *, points=(None, None), action=failpoints.kill):
    """Starts work(0, port) and work(1, port), and lets neither live on."""
    port, started = free_port(), []
    try:
        for index, point in enumerate(points):
            process = failpoints.Started(
                partial(work, index, port), folder, scratch, at=point, action=action
            )
            started.append(process)
        yield started
    finally:
        for process in started:
            process.kill()


def call(folder, scratch, *more, second=(), **options):
    """Trains with two processes to their end."""
    work = partial(train_part, folder, more, second)
    with pair(work, folder, scratch, **options) as started:
        return [process.end() for process in started]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, scratch):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = failpoints.call(partial(train, folder), folder, scratch)
    assert ended.code == 0, ended.output
    return folder


def assert_same_run(folder, alone):
    for name, count in (("metrics.jsonl", 2 * EPOCHS), ("steps.jsonl", 2 * LAST_STEP)):
        found, expected = (without_seconds(records(f, name)) for f in (folder, alone))
        assert len(found) == len(expected) == count
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    for seed in (0, 1):
        assert last_step(folder, seed) == LAST_STEP
        (found, _), (expected, _) = (last_state(f, seed) for f in (folder, alone))
        assert found.keys() == expected.keys()
        assert sum("params" in name for name in found) > 3
        for name, array in expected.items():
            np.testing.assert_allclose(
                found[name], array, rtol=1e-3, atol=1e-4, err_msg=name
            )


def assert_goes_on(folder, scratch, alone):
    before = records(folder)
    ended = call(folder, scratch)
    assert [one.code for one in ended] == [0, 0], ended
    # With the seconds, which tell a record that was kept from one made anew.
    kept = [record for record in before if record in records(folder)]
    assert kept == before[: len(kept)] == records(folder)[: len(kept)]
    assert_same_run(folder, alone)
    return len(kept)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_they_go_on_to_the_same_numbers(
    tmp_path, scratch, alone, killed
):
    folder = tmp_path / "run"
    # The third save begins when the second is done.
    point = "append metrics.jsonl 3"
    points = [point if index == killed else None for index in range(2)]
    ended = call(folder, scratch, points=points)
    assert ended[killed].code == -signal.SIGKILL
    # The other does not wait for ever.
    other = ended[1 - killed]
    assert other.code not in (0, 75), other
    assert not (folder / "summary.json").exists()
    assert assert_goes_on(folder, scratch, alone) >= 1


@pytest.mark.parametrize(
    ("point", "seed"),
    [
        ("append steps.jsonl 1", 0),
        # There is nothing left to save until the next seed has started.
        ("append metrics.jsonl 3", 1),
    ],
)
def test_one_is_told_to_end_and_they_go_on_to_the_same_numbers(
    tmp_path, scratch, alone, point, seed
):
    folder = tmp_path / "run"
    action = failpoints.terminate_one_of_several
    ended = call(folder, scratch, points=(None, point), action=action)
    for one in ended:
        assert one.code == 75, ended
        step = last_step(folder, seed)
        assert f"told to end: saved seed {seed} after {step} steps" in one.words
    assert 0 < step < LAST_STEP
    before = len(records(folder))
    assert assert_goes_on(folder, scratch, alone) == before


def test_processes_with_other_settings_do_not_train_together(tmp_path, scratch):
    folder = tmp_path / "run"
    for one in call(folder, scratch, second=("--learning-rate=0.9", "--ema=0.5")):
        assert one.code == 1
        named = "the processes have different settings: ema, optimizer.learning_rate;"
        assert named in one.words
    assert not folder.exists()


def test_one_that_cannot_go_on_ends_and_so_does_the_other(tmp_path, scratch):
    folder, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    models.save_weights(SmallNetwork(nnx.Rngs(0), 1, 10), weights)
    with pair(partial(lose_weights, folder, weights), folder, scratch) as started:
        first, second = [process.end() for process in started]
    assert second.code == 1
    assert "error: weights: the weights are gone" in second.words
    assert first.code == 1
    assert "error: process 1 has ended" in first.words


def test_of_a_stream_each_reads_its_part_and_one_writes(tmp_path, scratch, alone):
    folder = tmp_path / "run"
    first, second = call(folder, scratch, "--loader=grain", "--num-workers=0")
    assert [first.code, second.code] == [0, 0], (first, second)
    assert_same_run(folder, alone)
    assert f"after {LAST_STEP} steps" in first.words
    assert "steps" not in second.words
    files = [path for path in (folder / "tensorboard").rglob("*") if path.is_file()]
    # One for each seed, and one for the figures.
    assert sorted(path.parent.name for path in files) == ["seed0", "seed0", "seed1"]


def test_they_report_after_the_same_steps(tmp_path, scratch):
    with pair(train_with_fast_clock, tmp_path, scratch) as started:
        ended = [process.end() for process in started]
    assert [one.code for one in ended] == [0, 0], ended
    found = [json.loads(one.output.splitlines()[-1]) for one in ended]
    assert found[0] == found[1]
    counts, _ = found[0]
    assert sum(counts) == 15
    assert max(counts) > 1
