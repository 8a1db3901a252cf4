"""The benchmark of the training loop, on digits alone."""

import contextlib
import csv
import dataclasses
import sys

import numpy as np
import pytest

import benchmarks.__main__ as command_line
from benchmarks import loop


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "loop", *map(str, arguments)])
    command_line.main()


class CountingProgram:
    """Counts what it is told to do; its states are lists of steps taken."""

    compile_seconds = 2.0

    def __init__(self, width, steps_per_call):
        self.width = width
        self.steps_per_call = steps_per_call
        self.calls = []

    def init(self, seeds):
        return np.zeros(len(seeds), int)

    def feeds(self, seeds, first_step):
        yield tuple(seeds)

    def train(self, state, feed, steps):
        self.calls.append((feed, steps))
        return state + steps


@pytest.mark.parametrize(("width", "groups"), [(1, [(0,), (1,)]), (2, [(0, 1)])])
def test_bare_steps_are_as_many_for_every_seed(width, groups):
    program = CountingProgram(width, steps_per_call=4)
    timed = loop._steps(program, 8, seeds=(0, 1))
    assert timed.steps == 16
    timed.call()
    assert program.calls == [(group, 4) for group in groups for _ in range(2)]
    assert np.concatenate(timed.call()).tolist() == [16, 16]  # and they go on


def test_seconds_are_of_one_step_of_one_seed(monkeypatch):
    program = CountingProgram(1, 1)
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


@pytest.mark.slow
def test_every_part_is_measured(monkeypatch, capsys, tmp_path):
    subjects = loop._subjects

    def small(*arguments):
        subject = dataclasses.replace(
            subjects(*arguments)[0],
            batch_size=8,
            seed_steps=1,
            steps_per_call=(1, 2),
            techniques=("scale_by_random",),
        )
        return [subject, subject]

    monkeypatch.setattr(loop, "_subjects", small)
    actual, configs, programs = loop._compile, [], []

    def compile_once(config, dataset):  # one program stands for all, to save time
        configs.append(config)
        if not programs:
            programs.append(actual(config, dataset))
        return programs[0]

    monkeypatch.setattr(loop, "_compile", compile_once)
    folder = tmp_path / "run"
    run(monkeypatch, "--rounds", 1, "--cifar10", "image_folder/x", "--run-dir", folder)
    printed = capsys.readouterr().out
    assert "without image_folder/x: image_folder/x is not prepared" in printed
    assert "…" not in printed  # 80 columns hold the tables
    assert [
        (c.seeds, c.seed_strategy, c.steps_per_call, c.optimizer.tricks)
        for c in configs
    ] == [
        (1, "auto", None, ()),
        (4, "vmap", None, ()),
        (4, "devices", None, ()),
        (1, "auto", 2, ()),
        (1, "auto", None, ("scale_by_random",)),
    ]
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["name"]) for row in rows] == [
        ("loop", "steps"),
        ("loop", "steps, again"),
        ("loop", "epoch"),
        ("loop", "epoch, evaluated"),
        ("loop", "epoch, logged"),
        ("loop", "epoch, logged, saved"),
        ("4 seeds", "sequential"),
        ("4 seeds", "vmap"),
        ("4 seeds", "devices"),
        ("steps per call", "1 in a call"),
        ("steps per call", "2 in a call"),
        ("techniques in the loop", "sgd"),
        ("techniques in the loop", "scale_by_random"),
    ]
    for row in rows:
        assert float(row["seconds"]) > 0
        assert float(row["compile_seconds"]) > 0
        assert float(row["ratio_median"]) > 0
        assert row["commit"]
        assert row["name"] in printed
    # What the epochs wrote is gone with them.
    left = {path.name for path in folder.iterdir()}
    assert left - {".lock"} == {"config.json", "rows.csv"}


@pytest.mark.slow
def test_an_epoch_of_a_run_writes_what_a_run_writes(tmp_path):
    subject = dataclasses.replace(loop._subjects("none", 1)[0], batch_size=8)
    config = loop._config(subject, None)
    dataset = loop._load(config)
    assert [len(split) for split in dataset.splits.values()] == [80, 80]
    program = loop._compile(config, dataset)
    saving = loop._changed(program, checkpoint_minutes=0)
    with contextlib.ExitStack() as stack:
        for name, changed in (("logged", program), ("saved", saving)):
            path = tmp_path / name
            timed = loop._epoch_of_run(changed, dataset, path, stack)
            assert timed.steps == 10
            for epoch in (1, 2):
                timed.call()
                lines = (path / "metrics.jsonl").read_text().splitlines()
                assert len(lines) == epoch
            assert list(path.glob("tensorboard/seed0/*"))
            saved = [p.name for p in (path / "checkpoints").iterdir() if p.is_dir()]
            assert sorted(saved, key=int) == (["10", "20"] if name == "saved" else [])


def test_bad_numbers_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="rounds must be at least 1, got 0"):
        run(monkeypatch, "--rounds", 0)
