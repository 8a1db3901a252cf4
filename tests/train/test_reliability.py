"""Runs that are killed, told to end, short of disk or diverging: what they leave."""

import json
import math
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tests import failpoints
from tests.train.small_runs import (
    EPOCHS,
    LAST_STEP,
    last_state,
    last_step,
    records,
    train,
    train_with_room_for_one,
)
from tests.train.small_tasks import without_seconds
from train.output.preemption import EXIT_CODE
from train.run import checkpoint_folder

PARTS = 8  # of the slow tests, which pytest-xdist shares out


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def call(scratch):
    """Calls the command for a folder, in its own process."""

    def call(folder, *more, work=train, **options):
        work = partial(work, folder, *more)
        return failpoints.call(work, folder, scratch, **options)

    return call


@pytest.fixture(scope="module")
def undisturbed(call, tmp_path_factory):
    """The folder of a run that nothing disturbs, and the points that it meets."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = call(folder)
    assert ended.code == 0, ended.output
    return folder, ended.points


def assert_same_end(folder, undisturbed):
    other, _ = undisturbed
    for seed in (0, 1):
        assert last_step(folder, seed) == last_step(other, seed) == LAST_STEP
        (found, _), (expected, _) = (last_state(f, seed) for f in (folder, other))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    for name, count in (("metrics.jsonl", 2 * EPOCHS), ("steps.jsonl", 2 * LAST_STEP)):
        found, expected = (without_seconds(records(f, name)) for f in (folder, other))
        assert found == expected
        assert len(found) == count
    assert all(record["seconds"] > 0 for record in records(folder))
    found, expected = (
        json.loads((f / "summary.json").read_text()) for f in (folder, other)
    )
    assert found.keys() == expected.keys()
    assert found["intervals"] == expected["intervals"]
    assert pictures(folder) == pictures(other)
    assert not list(folder.rglob("*.part"))
    assert not list(folder.rglob("*-tmp*"))


def pictures(folder):
    """Names and sizes of the figures, which can be read to the end."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            found[path.name] = image.size
    return found


######## Killed #######################################################################


def assert_goes_on(call, folder, undisturbed):
    ended = call(folder)
    assert ended.code == 0, ended.output
    assert_same_end(folder, undisturbed)


def assert_killed(call, folder, point):
    ended = call(folder, at=point)
    assert ended.code == -signal.SIGKILL, (point, ended.output)
    assert ended.points[-1] == point
    assert not (folder / "summary.json").exists()


# In the order in which a run meets them, so that each time it goes further.
ONE_OF_EACH = (
    "half write_text config.json.part 1",
    "replace config.json 1",
    "mkdir checkpoints/seed0 1",
    "half append steps.jsonl 1",
    "fsync metrics.jsonl 1",
    "finalize checkpoints/seed0/2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp 1",
    "rename checkpoints/seed0/2 1",
    "rename checkpoints/seed0/4 1",
    "half rmtree checkpoints/seed0/2 1",
    "append steps.jsonl 4",
    "half savefig curves.png.part 1",
)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_undisturbed(
    call, tmp_path, undisturbed
):
    for point in ONE_OF_EACH:
        assert_killed(call, tmp_path / "run", point)
    assert_goes_on(call, tmp_path / "run", undisturbed)
    kinds = {point.removeprefix("half ").split()[0] for point in undisturbed[1]}
    killed = {point.removeprefix("half ").split()[0] for point in ONE_OF_EACH}
    assert killed == kinds


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_point_ends_as_if_undisturbed(
    call, tmp_path, undisturbed, part
):
    _, points = undisturbed
    assert len(points) > 100
    for number, point in enumerate(points[part::PARTS]):
        print(f"killed before {point!r}")
        folder = tmp_path / f"run{number}"
        assert_killed(call, folder, point)
        assert_goes_on(call, folder, undisturbed)
        shutil.rmtree(folder)


# Within an epoch, within a save, between two seeds and after the last checkpoint.
KILLED_FIRST = (
    "append steps.jsonl 5",
    "rename checkpoints/seed0/4 1",
    "write_text steps.jsonl.part 2",
    "savefig confusion_matrix.png.part 1",
)


@pytest.mark.slow
@pytest.mark.parametrize("first", KILLED_FIRST)
def test_a_run_killed_twice_ends_as_if_undisturbed(call, tmp_path, undisturbed, first):
    once = tmp_path / "once"
    assert_killed(call, once, first)
    shutil.copytree(once, tmp_path / "listed")
    points = call(tmp_path / "listed").points
    for number, second in enumerate(points[::5]):
        print(f"killed before {first!r}, and then before {second!r}")
        folder = tmp_path / f"run{number}"
        shutil.copytree(once, folder)
        assert_killed(call, folder, second)
        assert_goes_on(call, folder, undisturbed)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "point", ["half savefig confusion_matrix.png.part 1", "replace summary.json 1"]
)
def test_figures_are_drawn_though_all_steps_were_done(
    call, tmp_path, undisturbed, point
):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    for path in [folder / "summary.json", *folder.glob("*.png")]:
        path.unlink()
    assert_killed(call, folder, point)
    before = records(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder) == before  # nothing was trained again


######## Told to end ##################################################################


def assert_told(call, folder, point, said):
    ended = call(folder, at=point, action=failpoints.terminate)
    assert ended.code == EXIT_CODE == 75, ended.output
    assert f"told to end: {said} to {folder}; the same command goes on" in ended.words
    assert not (folder / "summary.json").exists()


def test_told_to_end_within_an_epoch(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    point = "append steps.jsonl 3"
    assert_told(call, folder, point, "saved seed 0 after 3 steps")
    assert last_step(folder) == 3
    assert [record["step"] for record in records(folder, "steps.jsonl")] == [1, 2, 3]
    _, seconds = last_state(folder)
    before = records(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder)[:1] == before
    # Those of the whole epoch, of which one step came before and one after.
    assert records(folder)[1]["seconds"] > seconds > 0


@pytest.mark.slow
def test_told_to_end_at_the_end_of_the_steps_of_an_epoch(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    point = "append steps.jsonl 4"
    assert_told(call, folder, point, "saved seed 0 after 4 steps")
    assert len(records(folder)) == 1
    _, seconds = last_state(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder)[1]["seconds"] == seconds > 0


@pytest.mark.slow
def test_told_to_end_during_a_save(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    name = "checkpoints/seed0/2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp"
    # In a thread of Orbax, while training goes on.
    ended = call(folder, at=f"finalize {name} 1", action=failpoints.terminate)
    assert ended.code == EXIT_CODE, ended.output
    assert f"saved seed 0 after {last_step(folder)} steps" in ended.words
    assert_goes_on(call, folder, undisturbed)


@pytest.mark.slow
def test_told_to_end_after_the_last_step_of_a_seed(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    point = "append metrics.jsonl 3"
    # There is nothing left to save, so it ends as soon as the next seed has started.
    assert_told(call, folder, point, "saved seed 1 after 1 steps")
    assert_goes_on(call, folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_told_to_end_at_any_point(call, tmp_path, undisturbed, part):
    _, points = undisturbed
    for number, point in enumerate(points[part :: 3 * PARTS]):
        print(f"told to end before {point!r}")
        folder = tmp_path / f"run{number}"
        ended = call(folder, at=point, action=failpoints.terminate)
        assert point in ended.points
        training = any("steps.jsonl" in line for line in points[: points.index(point)])
        drawing = "savefig curves.png.part 1" in points[: points.index(point) + 1]
        if training and not drawing:
            assert ended.code in (0, EXIT_CODE), ended.output
        elif ended.code != EXIT_CODE:  # before the first step and after the last
            assert ended.code == -signal.SIGTERM, ended.output
        assert_goes_on(call, folder, undisturbed)
        shutil.rmtree(folder)


######## A full disk, damage and divergence ###########################################


# In the order in which a run meets them, as above.
FULL_AT = (
    "half write_text config.json.part 1",
    "half append steps.jsonl 3",
    "half append metrics.jsonl 1",
    "mkdir checkpoints/seed0/4.orbax-checkpoint-tmp 1",
    "half write_text checkpoints/seed0/6.orbax-checkpoint-tmp/"
    "state.orbax-checkpoint-tmp/digests.json 1",
    "half savefig curves.png.part 1",
    "half write_text summary.json.part 1",
)


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_no_checkpoint(call, tmp_path, undisturbed):
    folder, kept = tmp_path / "run", 0
    for point in FULL_AT:
        ended = call(folder, at=point, action=failpoints.fill_disk)
        assert ended.code == 1, (point, ended.output)
        assert ended.words.startswith("error: "), (point, ended.output)
        assert "No space left" in ended.words
        assert "Traceback" not in ended.output
        if "mkdir" in point:  # training does not go on without it
            assert ended.points[-1] == point
        if (folder / "checkpoints").exists():
            assert last_step(folder) >= kept
            kept = last_step(folder)
    assert_goes_on(call, folder, undisturbed)


def test_no_room_for_a_checkpoint_is_said_before_it_is_begun(
    call, tmp_path, undisturbed
):
    folder = tmp_path / "run"
    ended = call(folder, work=train_with_room_for_one)
    assert ended.code == 1
    assert ended.words.startswith("error: cannot write a checkpoint to ")
    assert "MB to write, 0.0 MB free" in ended.words
    assert last_step(folder) == 2
    assert_goes_on(call, folder, undisturbed)


def test_a_damaged_checkpoint_is_passed_over(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    # The third save begins when the second is done.
    assert_killed(call, folder, "mkdir checkpoints/seed0/6.orbax-checkpoint-tmp 1")
    damaged = checkpoint_folder(folder, 0) / "4"
    largest = max(damaged.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    ended = call(folder)
    assert ended.code == 0, ended.output
    assert "4 is damaged" in ended.words
    assert "going on from step 2" in ended.words
    assert_same_end(folder, undisturbed)


def test_divergence_names_the_step_and_keeps_the_last_good_state(call, tmp_path):
    folder = tmp_path / "run"
    schedule = ("--schedule=step", "--milestones", "2", "--decay-factor=1e38")
    ended = call(folder, *schedule)
    assert ended.code == 1
    assert "loss of seed 0 is not finite at step 4 (epoch 3)" in ended.words
    assert f"the last good state is kept: checkpoint 4 in {folder}" in ended.words
    assert last_step(folder) == 4
    assert records(folder, "steps.jsonl")[-1]["step"] == 4
    arrays, _ = last_state(folder)
    floats = [x for x in arrays.values() if np.issubdtype(x.dtype, np.floating)]
    assert all(np.isfinite(x).all() for x in floats)
    assert all(math.isfinite(record["train_loss"]) for record in records(folder))
