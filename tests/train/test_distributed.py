"""Two processes, started as their user starts them, train to the numbers of one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tests.train.test_loop import program, run, without_seconds

from train.output.preemption import EXIT_CODE

ROOT = Path(__file__).parents[2]
EPOCHS = 6
STEPS = 60
COMMAND = (
    *("-m", "train", "classification", "--dataset", "digits"),
    *("--epochs", str(EPOCHS), "--batch-size", "100"),
    *("--checkpoint-minutes", "0", "--log-every", "1"),
)
LIMIT = 120  # seconds for what takes five on an idle machine

pytestmark = pytest.mark.slow


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        # One device each.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def ended(started):
    """Lets no process live on; inside JAX's distributed runtime SIGTERM ends none."""
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def pair(folder, *arguments, second=()):
    together = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2)
    arguments = (*COMMAND, "--run-dir", folder, *arguments, *together, "--process-id")
    return ended([start(*arguments, 0), start(*arguments, 1, *second)])


def finish(started):
    """Exit codes, and what each has said."""
    said = [process.communicate(timeout=LIMIT) for process in started]
    return [process.returncode for process in started], said


def wait_until(condition, started):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        if any(process.poll() is not None for process in started):
            pytest.fail(str(finish(started)))
        time.sleep(0.01)


def records(folder, name="metrics.jsonl"):
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_state(folder):
    path = folder / "checkpoints" / str(STEPS) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = checkpointer.metadata(path).item_metadata.tree
        args = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        return checkpointer.restore(path, restore_args=args)


def assert_same_run(folder, alone):
    assert [record["epoch"] for record in records(folder)] == [*range(1, EPOCHS + 1)]
    for name, count in (("metrics.jsonl", EPOCHS), ("steps.jsonl", STEPS)):
        pairs = zip(records(folder, name), records(alone, name), strict=True)
        for found, expected in pairs:
            found, expected = without_seconds([found, expected])
            assert found == pytest.approx(expected, rel=1e-3)
        assert len(records(folder, name)) == count
    found, expected = map(last_state, (folder, alone))
    assert found.keys() == expected.keys()
    assert sum("params" in name for name in found) > 10
    for name, array in expected.items():
        np.testing.assert_allclose(
            found[name], array, rtol=1e-3, atol=1e-4, err_msg=name
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with ended([start(*COMMAND, "--run-dir", folder)]) as started:
        codes, said = finish(started)
    assert codes == [0], said
    return folder


def test_killed_or_told_to_end_they_go_on_to_the_same_numbers(tmp_path, alone):
    folder = tmp_path / "run"
    with pair(folder) as started:
        wait_until((folder / "checkpoints" / "20").exists, started)
        started[0].kill()
        # The other does not wait for ever.
        codes, said = finish(started)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, EXIT_CODE)
    assert "another task died" in said[1][1]
    assert not (folder / "summary.json").exists()

    before = len(records(folder))
    with pair(folder) as started:
        wait_until(lambda: len(records(folder)) > max(before, 3), started)
        started[1].terminate()
        codes, said = finish(started)
    assert codes == [EXIT_CODE] * 2, said
    step = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 30 < step < STEPS
    for _, errors in said:
        assert f"told to end: saved after {step} steps" in errors

    before = records(folder)
    with pair(folder) as started:
        codes, said = finish(started)
    assert codes == [0, 0], said
    # With the seconds, which tell a record that was kept from one made anew.
    assert records(folder)[: len(before)] == before
    assert_same_run(folder, alone)


def test_one_that_cannot_go_on_ends_by_itself_and_the_others_do_too(tmp_path):
    wrong = ("--weights", tmp_path / "missing.safetensors")
    with pair(tmp_path / "run", second=wrong) as started:
        output, errors = started[1].communicate(timeout=LIMIT)
        assert started[1].returncode == 1, output + errors
        assert errors.startswith("error: --weights: ")
        (code, _), said = finish(started)
    assert code not in (0, EXIT_CODE), said


def test_of_a_stream_each_reads_its_part_and_one_writes(tmp_path, alone):
    folder = tmp_path / "run"
    with pair(folder, "--loader", "grain", "--num-workers", 0) as started:
        codes, said = finish(started)
    assert codes == [0, 0], said
    assert_same_run(folder, alone)
    ((first, _), (second, _)) = said
    assert f"after {STEPS} steps" in first
    assert "steps" not in second
    (events,) = (path for path in (folder / "tensorboard").rglob("*") if path.is_file())
    assert events.parent.name == "seed0"


UNEVEN = """
import json, sys, time
import jax

index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)

from tests.train.test_loop import program, run
from train.parallel import make_mesh
from train.loop import fit

steps = []
config = {"batch_size": 2, "epochs": 1}
for report in fit(program(mesh=make_mesh(), config=config), (0,)):
    time.sleep(0.7 * index)
    steps.append(report.steps)

epochs, _, _ = run(program(mesh=make_mesh(2), width=2), seeds=(0, 1))
print(json.dumps([steps, epochs]))
"""


def test_they_report_after_the_same_steps_and_may_have_a_seed_each():
    port = free_port()
    with ended([start("-c", UNEVEN, index, port) for index in range(2)]) as started:
        codes, said = finish(started)
    assert codes == [0, 0], said
    found = [json.loads(output.splitlines()[-1]) for output, _ in said]
    steps, (epochs, others) = zip(*found, strict=True)
    assert steps[0] == steps[1]
    assert sum(steps[0]) == 15
    expected, _, _ = run(program(), seeds=(0, 1))
    for a, b, c in zip(epochs, others, expected, strict=True):
        a, b, c = without_seconds([a, b, c])
        assert a == b == pytest.approx(c, rel=1e-4)
