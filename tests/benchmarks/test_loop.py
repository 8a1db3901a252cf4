"""The benchmark of the training loop, on digits and on the smallest task alone."""

import contextlib
import csv
import dataclasses
import math
import threading

import pytest

from benchmarks import loop
from benchmarks.loop import LoopConfig
from tests.train.small_tasks import make_program
from train.errors import UsageError

ENDLESS = {"epochs": 10**6, "eval_every": 10**6, "checkpoint_minutes": math.inf}


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def program():
    return make_program(num_train=32, config=ENDLESS)


class CountingProgram:
    """Counts what it is told to do; its states are numbers of steps."""

    compile_seconds = 2.0

    def __init__(self):
        self.feeds_taken = []

    def steps_before(self, epoch):
        return 3 * epoch

    def init_state(self, seed):
        return 0

    def feeds(self, seed):
        yield f"feed of seed {seed}"

    def train_step(self, state, feed):
        self.feeds_taken.append(feed)
        return state + 1


def test_bare_steps_are_as_many_as_in_an_epoch():
    program = CountingProgram()
    timed = loop._steps(program)
    assert timed.steps == 3
    assert timed.call() == 3
    assert program.feeds_taken == ["feed of seed 0"] * 3
    assert timed.call() == 6  # they go on


def test_seconds_are_those_of_one_step(monkeypatch):
    program = CountingProgram()
    timed = {
        name: loop.Timed(call=None, steps=steps, program=program)
        for name, steps in (("one", 2), ("other", 4))
    }
    seconds = {"one": [1.0, 2.0, 3.0], "other": [4.0, 6.0, 8.0]}
    monkeypatch.setattr(loop, "interleave", lambda calls, rounds: seconds)
    subject = loop._subjects("image_folder/cifar10", 3)[0]
    one, other = loop._measure("part", subject, timed)
    assert (one.seconds, other.seconds) == (1.0, 1.5)
    assert one.ratio.median == 1
    assert other.ratio.median == pytest.approx(1.5)  # of 2, 1.5 and 1.33
    assert (other.reference, other.compile_seconds) == ("one", 2.0)


######## Epochs one by one ############################################################


def test_a_loop_goes_on_for_one_epoch_at_a_time():
    epochs = []

    def train(pause):
        for epoch in range(100):
            epochs.append(epoch)
            pause()

    threads = threading.active_count()
    with loop.epoch_by_epoch(train) as next_epoch:
        assert epochs == []
        next_epoch()
        assert epochs == [0]
        next_epoch()
        assert epochs == [0, 1]
    assert epochs == [0, 1]
    assert threading.active_count() == threads


def test_a_loop_that_is_never_called_does_not_begin():
    with loop.epoch_by_epoch(lambda pause: pytest.fail("it began")):
        pass


def test_a_loop_is_closed_where_it_waits():
    closed = []

    def train(pause):
        with contextlib.closing(contextlib.ExitStack()) as stack:
            stack.callback(closed.append, True)
            pause()

    with loop.epoch_by_epoch(train) as next_epoch:
        next_epoch()
        assert not closed
    assert closed


def test_an_error_of_the_loop_is_raised_where_it_is_called():
    def fail(pause):
        pause()
        raise ValueError("lost")

    with loop.epoch_by_epoch(fail) as next_epoch:
        next_epoch()
        with pytest.raises(ValueError, match="lost"):
            next_epoch()


def test_a_loop_that_ends_does_not_block():
    with (
        loop.epoch_by_epoch(lambda pause: None) as next_epoch,
        pytest.raises(RuntimeError, match="came to its end"),
    ):
        next_epoch()


def count_evaluations(program, monkeypatch):
    evaluated = []
    evaluate = program.evaluate

    def count(state):
        evaluated.append(int(state.step))
        return evaluate(state)

    monkeypatch.setattr(program, "evaluate", count)
    return evaluated


def test_an_epoch_evaluates_only_where_it_is_told_to(program, stack, monkeypatch):
    evaluating = loop._changed(program, eval_every=1)
    evaluated = [count_evaluations(p, monkeypatch) for p in (program, evaluating)]
    for changed, steps in ((program, []), (evaluating, [4, 8])):
        timed = loop._epoch(changed, stack)
        assert timed.steps == 4
        timed.call()
        timed.call()
        assert evaluated[changed is evaluating] == steps
    assert program.config.eval_every == 10**6


@pytest.mark.parametrize("saves", [False, True])
def test_an_epoch_of_a_run_writes_what_a_run_writes(program, stack, tmp_path, saves):
    if saves:
        program = loop._changed(program, checkpoint_minutes=0)
    path = tmp_path / "run"
    timed = loop._epoch_of_run(program, path, stack)
    assert timed.steps == 4
    for epoch in (1, 2):
        timed.call()
        assert len((path / "metrics.jsonl").read_text().splitlines()) == epoch
        assert len((path / "steps.jsonl").read_text().splitlines()) == epoch
        folders = (path / "checkpoints/seed0").iterdir()
        saved = sorted(int(p.name) for p in folders if p.is_dir())
        # Each checkpoint is whole when its epoch ends.
        assert saved == ([4, 8][:epoch] if saves else [])
    assert list(path.glob("tensorboard/seed0/*"))


######## The command ##################################################################


def test_a_dataset_is_cut_to_ten_steps():
    subject = dataclasses.replace(loop._subjects("none", 1)[0], batch_size=8)
    dataset = loop._load(loop._config(subject, None))
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 80,
        "test": 80,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_every_part_is_measured(run, monkeypatch, capsys, tmp_path):
    subjects = loop._subjects

    def small(*arguments):
        return [dataclasses.replace(subjects(*arguments)[0], batch_size=8)]

    monkeypatch.setattr(loop, "_subjects", small)
    folder = tmp_path / "run"
    arguments = ("--rounds", 1, "--cifar10", "image_folder/x", "--run-dir", folder)
    run("loop", *arguments)
    printed = capsys.readouterr().out
    assert "without image_folder/x: image_folder/x is not prepared" in printed
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["name"]) for row in rows] == [
        ("loop", "steps"),
        ("loop", "steps, again"),
        ("loop", "epoch"),
        ("loop", "epoch, evaluated"),
        ("loop", "epoch, logged"),
        ("loop", "epoch, logged, saved"),
    ]
    for row in rows:
        assert float(row["seconds"]) > 0
        assert float(row["compile_seconds"]) > 0
        assert float(row["ratio_median"]) > 0
        assert row["commit"]
    lines = [line for line in printed.splitlines() if " [" in line]
    assert len(lines) == len(rows) + 1  # with the header, and each on one line
    assert max(map(len, lines)) <= 80
    # What the epochs wrote is gone with them.
    left = {path.name for path in folder.iterdir()}
    assert left - {".lock"} == {"config.json", "rows.csv"}


def test_bad_numbers_are_refused_from_python_too():
    with pytest.raises(UsageError, match="rounds must be greater than 0, got 0"):
        LoopConfig(rounds=0)
