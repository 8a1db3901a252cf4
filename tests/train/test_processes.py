"""Processes that are missing, wrong or dying: who says what, and how soon."""

import atexit
import os
import socket
import time

import jax
import pytest

from tests import forked
from tests.shared import free_port
from train import processes
from train.errors import UsageError

LIMIT = 600  # seconds for a test that hangs


class Clock:
    """Stands still until some others have come, and then runs out of patience."""

    def __init__(self, comers):
        self.missing, self.asked = comers, False

    def count(self, peer, connection):
        self.missing -= 1
        made(peer, connection)

    def monotonic(self):
        late = self.asked and self.missing <= 0
        self.asked = True  # the first time is when it starts to wait
        return 1e6 * late

    sleep = staticmethod(time.sleep)


made = processes._Peer.__init__


def start(pipe, arguments, comers):
    """Joins the others, says what has happened, and does what it is told."""
    processes._PATIENCE = float(LIMIT)
    if comers is not None:
        clock = processes.time = Clock(comers)
        processes._Peer.__init__ = lambda peer, it: clock.count(peer, it)
    processes.jax.distributed.initialize = lambda *_, **__: None
    try:
        processes.start_distributed(*arguments, show=pipe.send)
        pipe.send("")
    except UsageError as error:
        pipe.send(str(error))
        os._exit(1)
    if pipe.recv() == "die":
        os._exit(9)
    atexit._run_exitfuncs()  # multiprocessing leaves that out


class Started:
    """A process that joins others."""

    def __init__(self, arguments, comers):
        self.pipe, pipe = forked.processes.Pipe()
        self.process = forked.processes.Process(
            target=start, args=(pipe, arguments, comers)
        )
        self.process.start()
        pipe.close()

    def says(self):
        """Returns the next line: for whom it waits, and then an error, or nothing."""
        assert self.pipe.poll(LIMIT)
        return self.pipe.recv()

    def tell(self, what):
        """Lets it "die", or "end" in good order."""
        self.pipe.send(what)

    def code(self):
        self.process.join(LIMIT)
        return self.process.exitcode


@pytest.fixture
def join():
    started = []

    def join(*arguments, comers=None):
        """Starts one that waits for all, or until so many others have come."""
        started.append(Started(arguments, comers))
        return started[-1]

    yield join
    for one in started:
        one.process.kill()
        one.process.join()
        one.pipe.close()


WRONG = [
    # (coordinator, num_processes, process_id), what is said
    (("host", 2, 0), "coordinator must be HOST:PORT"),
    (("host:", 2, 0), "coordinator must be HOST:PORT"),
    ((":1234", 2, 0), "coordinator must be HOST:PORT"),
    (("host:0", 2, 0), "a port from 1 to 65535"),
    (("host:99999", 2, 0), "a port from 1 to 65535"),
    (("host:-1", 2, 0), "a port from 1 to 65535"),
    (("host:12", 0, 0), "num_processes must be at least 1, got 0"),
    (("host:12", 2, 2), "process_id must be from 0 to 1, got 2"),
    (("host:12", 2, -1), "process_id must be from 0 to 1, got -1"),
    (("host:12", 2, None), "belong together"),
    ((None, 2, 1), "belong together"),
    (("there.is.no.such.host.invalid:12", 2, 1), "there is no host"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_settings_are_refused_at_once(arguments, message):
    with pytest.raises(UsageError, match=message):
        processes.start_distributed(*arguments, show=lambda line: None)


LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@pytest.mark.parametrize(
    ("name", "value", "several"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("SLURM_NTASKS", "2", False),  # in an allocation, but not started by srun
        ("OMPI_COMM_WORLD_SIZE", "16", True),
        ("OMPI_COMM_WORLD_SIZE", "", False),
        ("TPU_WORKER_HOSTNAMES", "host0,host1", True),
        ("TPU_WORKER_HOSTNAMES", "localhost", False),
    ],
)
def test_launchers_are_recognized(monkeypatch, name, value, several):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: calls.append(a))
    for other in LAUNCHERS:
        monkeypatch.delenv(other, raising=False)
    processes.start_distributed(None, None, None, show=pytest.fail)
    assert calls == []
    monkeypatch.setenv(name, value)
    processes.start_distributed(None, None, None, show=pytest.fail)
    assert calls == [(None, None, None)] * several


def test_all_join_and_say_for_whom_they_wait(join):
    address = f"localhost:{free_port()}"
    started = [join(address, 3, i) for i in range(3)]
    assert [one.says() for one in started] == [
        "process 0 waits up to 600 s for processes 1, 2",
        f"process 1 waits up to 600 s for process 0 at {address}",
        f"process 2 waits up to 600 s for process 0 at {address}",
    ]
    assert [one.says() for one in started] == ["", "", ""]
    for one in started:
        one.tell("end")
    assert [one.code() for one in started] == [0, 0, 0]


def test_a_process_that_is_missing_is_named_by_all(join):
    address = f"localhost:{free_port()}"
    second = join(address, 4, 2)
    second.says()
    first = join(address, 4, 0, comers=1)
    first.says()
    for one in (first, second):
        assert one.says().startswith("processes 1, 3 of 4 did not join within 600 s")
        assert one.code() == 1


def test_the_first_process_is_missing(join):
    address = f"localhost:{free_port()}"
    second = join(address, 2, 1, comers=0)
    second.says()
    assert second.says().startswith(f"process 0 cannot be reached at {address}")
    assert second.code() == 1


def test_two_first_processes(join):
    port = free_port()
    with socket.create_server(("", port)):
        error = join(f"localhost:{port}", 2, 0).says()
    assert error.startswith(f"process 0 cannot use port {port} (Address already in use")
    assert "another process_id if there is a process 0" in error


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(3, 1), (3, 1)], "two processes have the process_id 1"),
        ([(4, 2)], "process 2 was started with num_processes 4"),
    ],
)
def test_what_does_not_fit_is_said_by_all(join, others, message):
    address = f"localhost:{free_port()}"
    started = [join(address, 3, 0), *(join(address, *other) for other in others)]
    for one in started:
        one.says()
    for one in started:
        assert one.says().startswith(message)
        assert one.code() == 1


def test_a_stranger_at_the_door_is_ignored(join):
    port = free_port()
    first = join(f"localhost:{port}", 2, 0)
    first.says()  # it listens
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process_id": "1"}\n', b""):
        with socket.create_connection(("localhost", port), timeout=LIMIT) as door:
            door.sendall(content)
    second = join(f"localhost:{port}", 2, 1)
    second.says()
    assert [first.says(), second.says()] == ["", ""]


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_the_others_end_when_one_dies(join, dying):
    address = f"localhost:{free_port()}"
    started = [join(address, 3, i) for i in range(3)]
    for one in started:
        one.says()
    assert [one.says() for one in started] == ["", "", ""]
    started[dying].tell("die")
    codes = [one.code() for one in started]
    assert codes == [9 if i == dying else 1 for i in range(3)]


@pytest.mark.parametrize("done", [0, 1])
def test_one_that_is_done_does_not_end_the_others(join, done):
    address = f"localhost:{free_port()}"
    started = [join(address, 2, i) for i in range(2)]
    for one in started:
        one.says()
    assert [one.says() for one in started] == ["", ""]
    for i in (done, 1 - done):
        started[i].tell("end")
        assert started[i].code() == 0
