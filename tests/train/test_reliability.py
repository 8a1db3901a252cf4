"""Runs that are killed, told to end, short of disk or diverging: what they leave."""

import dataclasses
import json
import math
import re
import shutil
import signal
import threading
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import failpoints
from tests.sweeps import parts
from tests.train.small_runs import (
    EPOCHS,
    LAST_STEP,
    last_state,
    last_step,
    read,
    records,
    train,
    train_again,
    train_with_room_for_one,
    use_small_network,
)
from tests.train.small_tasks import without_seconds
from train.errors import UsageError
from train.output.checkpoints import checkpoint_steps, find_checkpoint
from train.predict import export, load_run
from train.progress import make_console
from train.run import checkpoint_folder, checkpoint_seeds

PARTS = 5  # of a sweep over all points


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


def train_and_copy(folder, copies):
    failpoints.copy_at_each(partial(train, folder), folder, copies)


def copies_at_each(call, folder, copies):
    """Trains, and returns the points, and a folder by the number of its point.

    They hold what a kill at each point would leave.
    """
    copies.mkdir()
    ended = call(folder, copies, work=train_and_copy)
    assert ended.code == 0, ended.output
    return ended.points, {int(path.name): path for path in copies.iterdir()}


@dataclasses.dataclass
class Undisturbed:
    """A run that nothing disturbs, its points, and its folder at each of them."""

    folder: Path
    points: list[str]
    copies: dict[int, Path]

    @cached_property
    def arrays(self):
        """Arrays of the last checkpoint, for each seed."""
        return [last_state(self.folder, seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def undisturbed(call, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    folder = place / "run"
    return Undisturbed(folder, *copies_at_each(call, folder, place / "copies"))


def assert_same_end(folder, undisturbed):
    other = undisturbed.folder
    for seed in (0, 1):
        assert last_step(folder, seed) == last_step(other, seed) == LAST_STEP
        found, expected = last_state(folder, seed)[0], undisturbed.arrays[seed]
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


@pytest.mark.slow
def test_the_documentation_counts_the_events(undisturbed):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (said,) = re.findall(r"(\d+)\s+file events", page)
    whole = [point for point in undisturbed.points if not point.startswith("half ")]
    assert int(said) == len(whole)


######## Killed #######################################################################


def assert_goes_on(call, folder, undisturbed):
    ended = call(folder)
    assert ended.code == 0, ended.output
    assert_same_end(folder, undisturbed)


def train_each(_, folders):
    """Trains the run of each folder, one after the other."""
    for folder in folders:
        train_again(folder)


def assert_all_go_on(call, folder, undisturbed):
    """Goes on with many runs in one process, which has compiled their programs."""
    folders = sorted(folder.iterdir())
    # The points are those of one run: to look for them among the files of all is slow.
    ended = call(folders[0], folders, work=train_each)
    assert ended.code == 0, ended.output
    for path in folders:
        print(f"went on: {path.name}")
        assert_same_end(path, undisturbed)


def assert_killed(call, folder, point):
    ended = call(folder, at=point)
    assert ended.code == -signal.SIGKILL, (point, ended.output)
    assert ended.points[-1] == point
    assert_finished_last(folder, ended.points)


def assert_finished_last(folder, points):
    """The summary comes last, and after it only its name is brought to disk."""
    finished = "replace summary.json 1" in points[:-1]
    assert (folder / "summary.json").exists() == finished


# In the order in which a run meets them, so that each time it goes further.
ONE_OF_EACH = (
    "half write_text config.json.part 1",
    "replace config.json 1",
    "mkdir checkpoints/seed0 1",
    "half append steps.jsonl 1",
    "fsync metrics.jsonl 1",
    "finalize checkpoints/seed0/2.orbax-checkpoint-tmp 1",
    "rename checkpoints/seed0/2 1",
    "rename checkpoints/seed0/4 1",
    "half rmtree checkpoints/seed0/2.removed 1",
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
    kinds = {point.removeprefix("half ").split()[0] for point in undisturbed.points}
    killed = {point.removeprefix("half ").split()[0] for point in ONE_OF_EACH}
    assert killed == kinds


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(PARTS))
def test_a_run_killed_at_any_point_ends_as_if_undisturbed(
    call, tmp_path, undisturbed, part
):
    points = undisturbed.points
    # All but the point before the folder is made.
    assert sorted(undisturbed.copies) == list(range(1, len(points)))
    assert len(points) > 100
    for number in range(1 + part, len(points), PARTS):
        print(f"killed before {points[number]!r}: {number}")
        copy = shutil.copytree(undisturbed.copies[number], tmp_path / str(number))
        assert_finished_last(copy, points[: number + 1])
    assert_all_go_on(call, tmp_path, undisturbed)


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
    folder = tmp_path / "run"
    assert_killed(call, folder, first)
    points, copies = copies_at_each(call, folder, tmp_path / "copies")
    assert_same_end(folder, undisturbed)
    for number in range(0, len(points), 10):
        print(f"killed before {first!r}, and then before {points[number]!r}: {number}")
        shutil.copytree(copies[number], tmp_path / "chosen" / str(number))
    assert_all_go_on(call, tmp_path / "chosen", undisturbed)


@pytest.mark.slow
def test_figures_are_drawn_though_all_steps_were_done(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    for path in [folder / "summary.json", *folder.glob("*.png")]:
        path.unlink()
    for point in ("half savefig confusion_matrix.png.part 1", "replace summary.json 1"):
        assert_killed(call, folder, point)
        before = records(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder) == before  # nothing was trained again


######## Told to end ##################################################################


def assert_told(call, folder, point, said, action=failpoints.terminate, code=75):
    ended = call(folder, at=point, action=action)
    assert ended.code == code, ended.output
    assert f"told to end: {said} to {folder}; the same command goes on" in ended.words
    assert not (folder / "summary.json").exists()


def damage_records(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"train_loss"', '"train_lass"')[:-9])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "code", "harm"),
    [
        (failpoints.terminate, 75, lambda folder: None),
        (failpoints.interrupt, 130, damage_records),
    ],
    ids=["terminated", "interrupted, and records damaged"],
)
def test_told_to_end_within_an_epoch(call, tmp_path, undisturbed, action, code, harm):
    folder = tmp_path / "run"
    said = "saved seed 0 after 3 steps"
    assert_told(call, folder, "append steps.jsonl 3", said, action, code)
    assert last_step(folder) == 3
    assert [record["step"] for record in records(folder, "steps.jsonl")] == [1, 2, 3]
    _, seconds = last_state(folder)
    before = records(folder)
    harm(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder)[:1] == before
    # Those of the whole epoch, of which one step came before and one after.
    assert records(folder)[1]["seconds"] > seconds > 0


@pytest.mark.slow
def test_told_to_end_at_the_end_of_the_steps_of_an_epoch(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    assert_told(call, folder, "append steps.jsonl 4", "saved seed 0 after 4 steps")
    assert len(records(folder)) == 1
    _, seconds = last_state(folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder)[1]["seconds"] == seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "said"),
    [
        (
            "finalize checkpoints/seed0/2.orbax-checkpoint-tmp 1",
            "saved seed 0 after 2 steps",
        ),
        # There is nothing left to save, so it ends when the next seed has started.
        ("append metrics.jsonl 3", "saved seed 1 after 1 steps"),
    ],
)
def test_told_to_end_between_the_steps(call, tmp_path, undisturbed, point, said):
    folder = tmp_path / "run"
    assert_told(call, folder, point, said)
    assert_goes_on(call, folder, undisturbed)


def interrupt_twice():
    """Does what an impatient user does."""
    for _ in range(2):
        failpoints.interrupt()
    threading.Event().wait()  # for a thread to end this process


@pytest.mark.slow
def test_interrupted_twice_it_ends_at_once(call, tmp_path, undisturbed):
    folder = tmp_path / "run"
    ended = call(folder, at="append steps.jsonl 3", action=interrupt_twice)
    assert ended.code == 130, ended.output
    assert last_step(folder) == 2  # nothing was saved
    assert_goes_on(call, folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(PARTS))
def test_told_to_end_at_any_point(call, tmp_path, undisturbed, part):
    """Also before the first step and after the last one."""
    for number, point in enumerate(undisturbed.points[part :: 4 * PARTS]):
        print(f"told to end before {point!r}: {number}")
        folder = tmp_path / str(number)
        ended = call(folder, at=point, action=failpoints.terminate)
        assert point in ended.points
        finished = (folder / "summary.json").exists()  # before the signal arrived
        assert ended.code == 75 or (ended.code == 0 and finished), ended.output
        if ended.code == 75:
            assert "told to end" in ended.words
    assert_all_go_on(call, tmp_path, undisturbed)


######## What a run stands on #########################################################


def remove_records(folder):
    (folder / "steps.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()


def invent_records(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() * 3)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [damage_records, remove_records, invent_records])
def test_records_are_made_again_from_the_checkpoint(call, tmp_path, undisturbed, harm):
    folder = tmp_path / "run"
    said = "saved seed 0 after 5 steps"
    assert_told(call, folder, "append steps.jsonl 5", said)
    before = [records(folder, name) for name in ("metrics.jsonl", "steps.jsonl")]
    harm(folder)
    ended = call(folder)
    assert "seed 0 goes on from step 5 of 6" in ended.words
    assert_same_end(folder, undisturbed)
    assert records(folder)[:2] == before[0]
    assert records(folder, "steps.jsonl")[:5] == before[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "steps.jsonl", "curves.png", "confusion_matrix.png"],
)
def test_a_finished_run_has_all_its_results(call, tmp_path, undisturbed, name):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    assert "already holds this run, finished" in call(folder).words
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    before = records(undisturbed.folder)
    assert_goes_on(call, folder, undisturbed)
    assert records(folder) == before  # nothing was trained again


def test_a_start_that_fails_leaves_no_folder(call, tmp_path):
    folder = tmp_path / "run"
    ended = call(folder, f"--weights={tmp_path / 'missing.safetensors'}")
    assert ended.code == 1
    assert "missing.safetensors" in ended.words
    assert not folder.exists()


def contents(folder):
    """The files in a folder, without those of checkpoints and hidden ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and "checkpoints" not in path.parts
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", [failpoints.kill, failpoints.fill_disk], ids=["killed", "full disk"]
)
@pytest.mark.parametrize("command", ["export", "predict"])
def test_results_are_whole_or_not_there(call, tmp_path, undisturbed, command, action):
    image = tmp_path / "digit.png"
    Image.new("L", (8, 8), 200).save(image)
    more = (image,) if command == "predict" else ()
    work = partial(read, command)

    def begin(name):
        folder = tmp_path / name
        shutil.copytree(undisturbed.folder, folder)
        return folder

    def run(folder, **options):
        whole = partial(work, folder, *more)
        return failpoints.call(whole, folder, tmp_path, **options)

    whole = begin("whole")
    before = contents(whole)
    ended = run(whole)
    assert ended.code == 0, ended.output
    expected = contents(whole)
    assert expected.keys() > before.keys()
    assert len(ended.points) >= 3
    print(f"{command}: {len(ended.points)} points")
    for number, point in enumerate(ended.points):
        folder = begin(str(number))
        stopped = run(folder, at=point, action=action)
        if action is failpoints.fill_disk and not point.startswith("mkdir . "):
            assert stopped.code == 1, (point, stopped.output)
            assert "error: " in stopped.words
            assert "Traceback" not in stopped.output
        found = contents(folder)
        assert found.items() <= expected.items(), point
        assert run(folder).code == 0
        assert contents(folder) == expected


def export_each(_, folders):
    """Exports from what a reader finds at each point."""
    use_small_network()
    for found in folders:
        before = contents(found)
        steps = checkpoint_steps(checkpoint_folder(found, 0))
        try:
            export(load_run(found, None, make_console()), None, make_console())
        except UsageError as error:
            assert not steps, found
            print(f"refused: {error}")
        else:
            assert contents(found).keys() == {*before, "weights.safetensors"}
            print(f"exported step {steps[-1]}")


@pytest.mark.slow
def test_a_run_can_be_exported_at_any_point(call, tmp_path, undisturbed):
    for number, copy in undisturbed.copies.items():
        if not undisturbed.points[number].startswith("half "):
            shutil.copytree(copy, tmp_path / str(number))
    folders = sorted(tmp_path.iterdir())
    ended = call(folders[0], folders, work=export_each)
    assert ended.code == 0, ended.output
    said = ended.output.count("refused: "), ended.output.count("exported step")
    assert min(said) > 5
    assert sum(said) == len(folders)
    assert f"exported step {LAST_STEP}" in ended.output


######## A full disk, damage and divergence ###########################################


# In the order in which a run meets them, as above.
FULL_AT = (
    "half write_text config.json.part 1",
    "half append steps.jsonl 3",
    "half append metrics.jsonl 1",
    "mkdir checkpoints/seed0/4.orbax-checkpoint-tmp 1",
    "half write_text checkpoints/seed0/6.orbax-checkpoint-tmp/digests.json 1",
    "half savefig curves.png.part 1",
    "half write_text summary.json.part 1",
)


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_no_checkpoint(call, tmp_path, undisturbed):
    folder, kept = tmp_path / "run", 0
    for point in FULL_AT:
        ended = call(folder, at=point, action=failpoints.fill_disk)
        assert ended.code == 1, (point, ended.output)
        assert "error: " in ended.words, (point, ended.output)
        assert "No space left" in ended.words
        assert "Traceback" not in ended.output
        if "mkdir" in point:  # training does not go on without it
            assert ended.points[-1] == point
        if (folder / "checkpoints").exists():
            assert last_step(folder) >= kept
            kept = last_step(folder)
    assert_goes_on(call, folder, undisturbed)


def fill_disk_at_each(folder, points):
    """Trains with a disk that is full from one point on, for each of the points."""
    for point in points:
        shutil.rmtree(folder, ignore_errors=True)
        failpoints.points.act(point, failpoints.fill_disk)
        said = ""
        try:
            train_again(folder)
        except SystemExit as ended:
            said = str(ended)
        if said:
            assert said.startswith("error: "), (point, said)
            assert "No space left" in said, (point, said)
            assert "\n" not in said, (point, said)
        else:  # the folder is there already, so nothing was to be written
            assert point.startswith("mkdir "), point
            assert (folder / "summary.json").exists()
        for seed in checkpoint_seeds(folder):
            path = checkpoint_folder(folder, seed)
            found = find_checkpoint(path, warn=pytest.fail, identity={"seed": seed})
            steps = checkpoint_steps(path)
            assert (found.step if found else None) == (steps[-1] if steps else None)
        print(f"full before {point!r}")


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(PARTS))
def test_a_disk_that_is_full_at_any_point_is_said(call, tmp_path, undisturbed, part):
    folder = tmp_path / "run"
    points = [p for p in undisturbed.points[part::PARTS] if not p.startswith("half ")]
    ended = call(folder, points, work=fill_disk_at_each)
    assert ended.code == 0, ended.output
    assert ended.output.count("full before") == len(points)
    assert_goes_on(call, folder, undisturbed)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
