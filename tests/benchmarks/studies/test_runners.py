"""Studies of a few steps that several processes share, as a user starts them."""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.studies.config import CompareConfig
from benchmarks.studies.runners import runners
from train.errors import UsageError

ROOT = Path(__file__).parents[3]
STUDY = (
    *("compare", "classification", "--dataset", "digits", "--epochs", "1"),
    *("--train-examples", "60", "--batch-size", "20", "--seeds", "2"),
    *("--techniques", "perturbed_unit_step"),  # with two baselines
)
RUNS = [
    (name, seed)
    for name in ("perturbed_unit_step", "sgd", "sgd, 2x epochs")
    for seed in range(2)
]
LIMIT = 300  # seconds for what takes some on an idle machine

# The command, which begins with a run and acts when the others have added a row.
_ACTS = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from benchmarks.studies import study
import benchmarks.__main__ as command_line
from train.signals import listen

def act(): {action}

folder, train, acted = Path(sys.argv[-1]), study.train, False

def train_after_others(*arguments):
    global acted
    if not acted:
        acted = True
        others = [str(child.pid) for child in multiprocessing.active_children()]
        (folder / "others.txt").write_text(" ".join(others))
        while not (folder / "rows.jsonl").exists():
            time.sleep(0.01)
        act()
    return train(*arguments)

listen()
study.train = train_after_others
command_line.main()
"""


def begin(folder, *more, action=None):
    code = (
        ["-m", "benchmarks"] if action is None else ["-c", _ACTS.format(action=action)]
    )
    command = [sys.executable, *code, *STUDY, *more, "--run-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": ""}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, code=0):
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code, output
    return output


def scores(folder):
    """The scores of the runs, each of which there is once."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    assert sorted((row["method"], row["seed"]) for row in rows) == RUNS
    return {
        (row["method"], row["seed"]): [
            row["accuracy"],
            *(point["accuracy"] for point in row["curve"]),
        ]
        for row in rows
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The scores that one command finds alone."""
    folder = tmp_path_factory.mktemp("alone") / "study"
    end(begin(folder))
    return scores(folder)


def assert_finished(folder, expected):
    assert scores(folder) == expected
    page = (folder / "report.html").read_text()
    assert "2 seeds each" in page
    assert len((folder / "rows.csv").read_text().splitlines()) == 1 + len(RUNS)


@pytest.mark.slow
def test_two_commands_share_a_study(tmp_path, expected):
    folder = tmp_path / "study"
    first = begin(folder, action="pass")
    second = begin(folder)
    said = [end(process) for process in (first, second)]
    assert_finished(folder, expected)
    for output in said:
        assert f"Written to {folder}" in output.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "action",
    ["pass", "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"],
    ids=["two runners", "one of two is killed"],
)
def test_runners_find_what_one_finds(tmp_path, expected, action):
    folder = tmp_path / "study"
    output = end(begin(folder, "--runners", "2", action=action))
    assert "6 runs to train" in output
    assert "by one process" in output
    assert_finished(folder, expected)
    assert_ended(folder)


def assert_ended(folder):
    (other,) = map(int, (folder / "others.txt").read_text().split())
    limit = time.monotonic() + LIMIT
    while psutil.pid_exists(other):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
def test_a_command_that_is_told_to_end_goes_on(tmp_path, expected):
    folder = tmp_path / "study"
    action = f"os.kill(os.getpid(), signal.SIGTERM); time.sleep({LIMIT})"
    end(begin(folder, "--runners", "2", action=action), code=75)
    assert_ended(folder)
    assert not (folder / "report.html").exists()
    end(begin(folder, "--runners", "2"))
    assert_finished(folder, expected)


def work_for_ever(config, folder):
    (folder / "others.txt.part").write_text(str(os.getpid()))
    (folder / "others.txt.part").rename(folder / "others.txt")
    time.sleep(10 * LIMIT)


def be_killed(folder):
    config = CompareConfig(task="classification", runners=2)
    with runners(config, folder, work_for_ever):
        while not (folder / "others.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_runners_end_with_a_command_that_is_killed(tmp_path):
    call = f"be_killed(Path({str(tmp_path)!r}))"
    code = f"from tests.benchmarks.studies.test_runners import *; {call}"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LIMIT)
    assert killed.returncode == -signal.SIGKILL
    assert_ended(tmp_path)


@pytest.mark.slow
def test_what_cannot_be_trained_is_said_once_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "study"
    output = end(begin(folder, "--runners", "3", "--train-examples", "10"), code=1)
    assert len(output.splitlines()) == 1
    assert "batch" in output
    assert not folder.exists()


def _write_flags(config: CompareConfig, folder: Path) -> None:
    part = folder / "part"
    part.write_text(os.environ["XLA_FLAGS"])
    part.rename(folder / "flags")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is for x86-64")
def test_other_processes_set_up_the_cpu_too(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "")
    config = CompareConfig(task="classification", runners=2)
    with runners(config, tmp_path, _write_flags):
        start = time.monotonic()
        while not (tmp_path / "flags").exists() and time.monotonic() < start + LIMIT:
            time.sleep(0.01)
    assert "--xla_cpu_experimental_ynn_fusion_type" in (tmp_path / "flags").read_text()


######## Ray ##########################################################################


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return pytest.importorskip("ray", reason="Ray is not installed")


# Ray forks to start a cluster, which a process in which JAX runs must not do.
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

arguments = {"num_cpus": 2, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=arguments)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster(ray, monkeypatch):
    """The address of a cluster of two workers on this machine."""
    command = [sys.executable, "-c", _CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = (line.split() for line in process.stdout)
        address = next(words[1] for words in lines if words[:1] == ["address"])
        # `auto` takes this one, and not another one that runs here.
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address
        process.communicate()


@pytest.mark.slow
def test_workers_of_ray_find_what_one_finds(tmp_path, expected, cluster):
    folder = tmp_path / "study"
    begun = begin(folder, "--runners", "3", "--ray", "auto", action="pass")
    assert "Traceback" not in end(begun)
    assert_finished(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "address", "no address"])
def test_a_cluster_that_is_not_there_is_said_in_one_line(ray, tmp_path, name):
    """Within half a minute on an idle machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    address = {"address": f"{host}:{port}"}.get(name, name)
    config = CompareConfig(task="classification", runners=2, ray=address)
    message = f"no Ray cluster at {re.escape(address)} (.*): start one with `ray start"
    with (
        pytest.raises(UsageError, match=message) as error,
        runners(config, tmp_path, lambda config, folder: None),
    ):
        pass
    assert "\n" not in str(error.value)


def test_without_ray_another_way_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    config = CompareConfig(task="classification", runners=2, ray="auto")
    with (
        pytest.raises(
            UsageError, match="ray is not installed: pip install --group ray"
        ),
        runners(config, tmp_path, lambda config, folder: None),
    ):
        pass
