"""Runs that are killed, told to end, short of disk or diverging: what they leave."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import train.__main__ as command_line
from train.output.checkpoints import Checkpoints
from train.output.preemption import EXIT_CODE

ROOT = Path(__file__).parents[2]
KILLS = 10
EPOCHS = 4
COMMON = (
    *(
        "classification",
        "--techniques",
        "perturbed_unit,random",
        "--augment",
        "pad_crop",
    ),
    *("--checkpoint-minutes", "0", "--log-every", "3", "--ema", "0.9"),
)

pytestmark = pytest.mark.usefixtures("one_device")


def run(monkeypatch, folder, *arguments, epochs=EPOCHS):
    arguments = (*COMMON, "--epochs", epochs, "--run-dir", folder, *arguments)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    command_line.main()


def start(folder, epochs):
    command = [sys.executable, "-m", "train", *COMMON, "--epochs", str(epochs)]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def records(folder, name="metrics.jsonl"):
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def last_checkpoint(folder):
    steps = [
        int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()
    ]
    return folder / "checkpoints" / str(max(steps))


def assert_same_end(folder, other):
    assert last_checkpoint(folder).name == last_checkpoint(other).name
    with ocp.StandardCheckpointer() as checkpointer:
        found, expected = (
            checkpointer.restore(last_checkpoint(place) / "state")
            for place in (folder, other)
        )
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert records(folder, name) == records(other, name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(folder, EPOCHS))
    return folder


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(tmp_path):
    epochs = 12
    finish(start(tmp_path / "whole", epochs))
    folder, rng, kills = tmp_path / "run", random.Random(0), 0
    while kills < KILLS:
        process = start(folder, epochs)
        # Some steps further than before, or right at the beginning.
        target = len(records(folder, "steps.jsonl")) + rng.randrange(8)
        while process.poll() is None and kills < KILLS:
            begun = (folder / "config.json").exists()
            if begun and len(records(folder, "steps.jsonl")) >= target:
                time.sleep(0.2 * rng.random())
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
    finish(start(folder, epochs))
    assert_same_end(folder, tmp_path / "whole")
    assert (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_run_told_to_end_saves_and_says_so_by_its_exit_code(tmp_path):
    folder, epochs = tmp_path / "run", 40
    process = start(folder, epochs)
    while len(records(folder, "steps.jsonl")) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75
    assert f"{folder}; the same command goes on" in errors
    stopped = int(last_checkpoint(folder).name)
    assert stopped >= records(folder, "steps.jsonl")[-1]["step"]
    finish(start(folder, epochs))
    steps = [record["step"] for record in records(folder, "steps.jsonl")]
    assert steps == sorted(set(steps))
    finish(start(tmp_path / "whole", epochs))
    assert_same_end(folder, tmp_path / "whole")


def test_told_to_end_during_a_save(monkeypatch, tmp_path, undisturbed):
    save = Checkpoints.save

    def save_and_be_told(self, step, state):
        save(self, step, state)  # writes in the background
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save_and_be_told)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path / "run")
    assert stopped.value.code == EXIT_CODE
    assert 20 <= int(last_checkpoint(tmp_path / "run").name) < 40
    monkeypatch.setattr(Checkpoints, "save", save)
    run(monkeypatch, tmp_path / "run")
    assert_same_end(tmp_path / "run", undisturbed)


def unfinished(monkeypatch, folder):
    """A run cut off before its last record and checkpoint."""

    def fail(self, step, state):
        if step == 40:
            raise KeyboardInterrupt
        save(self, step, state)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(SystemExit, match="interrupted"):
            run(patch, folder)


def test_a_damaged_checkpoint_is_passed_over(
    monkeypatch, tmp_path, undisturbed, capsys
):
    folder = tmp_path / "run"
    unfinished(monkeypatch, folder)
    damaged = last_checkpoint(folder)
    assert damaged.name == "30"
    largest = max(damaged.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    run(monkeypatch, folder)
    printed = " ".join(capsys.readouterr().out.split())
    assert "30 is damaged" in printed
    assert "going on from step 20" in printed
    assert_same_end(folder, undisturbed)


def test_a_full_disk_is_said_and_costs_no_checkpoint(
    monkeypatch, tmp_path, undisturbed
):
    folder, room = tmp_path / "run", Checkpoints._check_room

    def check_room(self, num_bytes):
        if "20" in os.listdir(self._folder):
            num_bytes = 1 << 60
        room(self, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_check_room", check_room)
        with pytest.raises(SystemExit, match=r"error: .*(room|space|disk)"):
            run(patch, folder)
    assert last_checkpoint(folder).name == "20"
    run(monkeypatch, folder)
    assert_same_end(folder, undisturbed)


def test_divergence_names_the_step_and_keeps_the_last_good_state(
    monkeypatch, tmp_path, capsys
):
    schedule = ("--schedule", "step", "--milestones", 2, "--decay-factor", 1e30)
    with pytest.raises(SystemExit, match=r"not finite at step 2\d \(epoch 3\)"):
        run(monkeypatch, tmp_path / "run", *schedule)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"the last good state is kept: checkpoint 20 in {tmp_path}" in printed
    assert last_checkpoint(tmp_path / "run").name == "20"
    # It was seen within the logging interval, of three steps.
    assert records(tmp_path / "run", "steps.jsonl")[-1]["step"] >= 18
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(last_checkpoint(tmp_path / "run") / "state")
    floats = [x for x in state.values() if np.issubdtype(x.dtype, np.floating)]
    assert all(np.isfinite(x).all() for x in floats)
