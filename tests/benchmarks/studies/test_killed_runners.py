"""A runner of a study is killed at each of its file events, and others finish it.

Training is replaced, so that a study takes a moment.
"""

import itertools
import json
import signal
import time
import types
from functools import partial
from pathlib import Path

import filelock
import pytest

from benchmarks.studies import compare, study, tuning
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.plan import Cost
from tests import failpoints
from tests.sweeps import parts
from train import plots
from train.files import whole_file

NAMES = ("sgd", "centralize")
RUNS = [(name, seed) for seed in range(2) for name in NAMES]
PARTS = 5  # of a sweep over all points
RESULTS = ("table.md", "rows.csv", "report.html", "learning_curves.png")


def train_at_once(compiled, seed, reporter, text):
    """Returns a row that depends on the method and the seed alone."""
    name = compiled.method.name
    score = 0.5 + 0.1 * NAMES.index(name) + 0.01 * seed
    point = {"epoch": 1, "gradient_evaluations": 9, "seconds": 1.0, "accuracy": score}
    return {
        **{"method": name, "seed": seed, "accuracy": score, "ms_per_step": 1.0},
        **{"gradient_evaluations": 9, "failure": None, "curve": [point]},
        "environment": {"device": "none", "processor": "none", "jax": "0"},
    }


def draw_at_once(curves, path, **options):
    with whole_file(path) as part:
        part.write_bytes(b"drawn")


def replace_training(patch, train=train_at_once):
    program = types.SimpleNamespace(init_state=lambda seed: None)

    def compile_at_once(opened, method, epochs):
        return types.SimpleNamespace(method=method, num_steps=9, program=program)

    cost = Cost(start=0.1, step=0.1, evaluation=0.1, steps_per_epoch=9)
    patch.setattr(study, "train", train)
    patch.setattr(tuning, "train", train)
    patch.setattr(study, "measure", lambda program, factor: cost)
    patch.setattr(study.OpenedStudy, "compile", compile_at_once)
    patch.setattr(plots, "save_learning_curves", draw_at_once)


def config(**options):
    return CompareConfig(
        task="classification", techniques=("centralize",), seeds=2, **options
    )


def rows(folder, name="rows.jsonl"):
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def runs(folder):
    return [(row["method"], row["seed"]) for row in rows(folder)]


######## The runner that is killed ####################################################


def meet_locks():
    """Makes each lock that this process takes a point, and each that it gives back."""
    acquire = filelock.FileLock.acquire

    def acquire_and_meet(lock, *args, **kwargs):
        acquired = acquire(lock, *args, **kwargs)
        failpoints.points._meet("lock", Path(lock.lock_file))
        return acquired

    filelock.FileLock.acquire = acquire_and_meet
    failpoints.points._wrap(filelock.FileLock, "_release", lambda lock: lock.lock_file)


def run_command(folder):
    """The command that a user starts."""
    replace_training(pytest.MonkeyPatch())
    meet_locks()
    compare.compare(config(), folder)


def run_helper(folder):
    """What `--runners` starts."""
    replace_training(pytest.MonkeyPatch())
    meet_locks()
    compare.join(config(), folder)


######## The runner that goes on ######################################################


def alone(work, folder, scratch, at=None):
    """Lets a runner work, and another one when that has ended."""
    ended = failpoints.call(partial(work, folder), folder, scratch, at=at)
    with pytest.MonkeyPatch.context() as patch:
        replace_training(patch)
        compare.compare(config(), folder)
    return ended


def beside(work, folder, scratch, at=None):
    """Lets a runner work beside another one.

    The other one has begun with a run, and goes on with it when the first one has ended
    or has nothing else to do. So that meets the same events each time.
    """
    started = []

    def train_beside(*arguments):
        if not started:
            runner = failpoints.Started(partial(work, folder), folder, scratch, at=at)
            started.append(runner)
            while runner.is_alive and not has_nothing_else_to_do(folder):
                time.sleep(0.01)
        return train_at_once(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        replace_training(patch, train_beside)
        compare.compare(config(), folder)
    return started[0].end()


def has_nothing_else_to_do(folder):
    return (folder / "rows.jsonl").exists() and len(runs(folder)) == len(RUNS) - 1


SCENES = {
    "alone": (alone, run_command),
    "beside another command": (beside, run_command),
    "as its helper": (beside, run_helper),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def undisturbed(scratch):
    """The folder of a study that nothing disturbs, and the points of each scene."""
    points = {}
    for number, (name, (scene, work)) in enumerate(SCENES.items()):
        ended = scene(work, scratch / str(number), scratch)
        assert ended.code == 0, ended.output
        points[name] = ended.points
        assert sorted(runs(scratch / str(number))) == sorted(RUNS)
    return scratch / "0", points


@pytest.mark.slow
def test_a_runner_meets_the_events_of_its_share(undisturbed):
    _, points = undisturbed
    for name, met in points.items():
        print(f"{name}: {len(met)} events")
        appended = [point for point in met if point.startswith("append rows.jsonl")]
        assert len(appended) == (len(RUNS) if name == "alone" else len(RUNS) - 1)
        kinds = {point.removeprefix("half ").split()[0] for point in met}
        assert {"lock", "_release", "append", "fsync", "mkdir"} <= kinds
        assert ("replace" in kinds) == (name != "as its helper")


def assert_same_results(folder, undisturbed):
    assert sorted(runs(folder)) == sorted(RUNS)  # none is lost, and none is repeated
    for name in RESULTS:
        assert (folder / name).stat().st_size > 0
    assert (folder / "table.md").read_text() == (undisturbed / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(PARTS))
@pytest.mark.parametrize("name", SCENES)
def test_a_runner_killed_at_any_point_loses_no_run(
    tmp_path, scratch, undisturbed, name, part
):
    expected, points = undisturbed
    scene, work = SCENES[name]
    chosen = points[name][part::PARTS]
    for number, point in enumerate(chosen):
        print(f"killed before {point!r}: {number}")
        ended = scene(work, tmp_path / str(number), scratch, at=point)
        assert ended.code == -signal.SIGKILL, (point, ended.output)
        assert ended.points[-1] == point
        assert_same_results(tmp_path / str(number), expected)
    print(f"killed at {len(chosen)} of {len(points[name])} events")


######## Learning rates ###############################################################


def run_with_trials(folder):
    replace_training(pytest.MonkeyPatch())
    compare.compare(config(trials=3), folder)


@pytest.mark.slow
def test_runners_share_the_trials_of_learning_rates_too(tmp_path, scratch):
    folder = tmp_path / "study"
    started = [
        failpoints.Started(partial(run_with_trials, folder), folder, scratch)
        for _ in range(3)
    ]
    for runner in started:
        ended = runner.end()
        assert ended.code == 0, ended.output
    found = [
        (row["method"], row["learning_rate"], row["seed"])
        for row in rows(folder, tuning.TRIALS)
    ]
    rates = tuning.rates_to_try(config().base.learning_rate, 3)
    expected = itertools.product(NAMES, rates, (1_000_000, 1_000_001))
    assert sorted(found) == sorted(expected)
    assert sorted(runs(folder)) == sorted(RUNS)
