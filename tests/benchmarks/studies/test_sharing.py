"""Several processes share pieces of work, and some of them are killed."""

import collections
import contextlib
import json
import os
import signal
import threading
import time
from functools import partial

import pytest

from benchmarks.studies.sharing import append, share
from tests.failpoints import processes
from train.output.run_folder import RunFolder, open_run_folder

WORK = [f"sam:rho=0.1+centralize, seed {seed}" for seed in range(12)]
LIMIT = 120  # seconds for what takes a few on an idle machine
LONG = 20_000  # characters of a line, more than is written at once


def wait_until(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def folder_at(path):
    return RunFolder(path, {})


def done_in(folder):
    return [record["name"] for record in folder.read("rows.jsonl")]


def work_together(path, names=WORK, act=lambda name: None, at_once=0):
    """Does pieces of work as one of several processes; tells the others by a row.

    Args:
      path: the folder.
      names: the pieces of work.
      act: what is done before the row is appended.
      at_once: how many processes there must be before the first piece is done.
    """
    folder = folder_at(path)

    def do(name):
        (path / f"{os.getpid()}.begun").touch()
        wait_until(lambda: len(list(path.glob("*.begun"))) >= at_once)
        act(name)
        append(folder, "rows.jsonl", {"name": name, "process": os.getpid()})

    work = {name: partial(do, name) for name in names}
    share(folder, work, partial(done_in, folder))
    assert set(done_in(folder)) >= set(names)


def start(function, *args, **kwargs):
    process = processes.Process(target=function, args=args, kwargs=kwargs, daemon=True)
    process.start()
    return process


def end(*started, code=0):
    for process in started:
        process.join(LIMIT)
        assert process.exitcode == code


@pytest.mark.parametrize("count", [2, 3])
def test_every_piece_is_done_once_by_concurrent_processes(tmp_path, count):
    end(*[start(work_together, tmp_path, at_once=count) for _ in range(count)])
    rows = folder_at(tmp_path).read("rows.jsonl")
    assert sorted(row["name"] for row in rows) == sorted(WORK)
    assert len({row["process"] for row in rows}) == count


def test_threads_share_as_processes_do(tmp_path):
    threads = [
        threading.Thread(target=work_together, args=(tmp_path,)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done_in(folder_at(tmp_path))) == sorted(WORK)


def test_what_is_done_is_not_done_again(tmp_path):
    work_together(tmp_path, WORK[:5])
    begun = []
    work_together(tmp_path, act=begun.append)
    assert begun == WORK[5:]
    work_together(tmp_path, act=pytest.fail)


def test_what_another_one_does_meanwhile_is_not_done_again(tmp_path):
    """All work is missing at the start, and half of it is done by another process."""
    begun = []

    def let_another_work(name):
        begun.append(name)
        if name == WORK[0]:
            end(start(work_together, tmp_path, WORK[1::2]))

    work_together(tmp_path, act=let_another_work)
    assert begun == WORK[::2]


def kill(name):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_killed(name):
    time.sleep(LIMIT)


def test_the_work_of_a_killed_process_is_done_by_another(tmp_path):
    killed = start(work_together, tmp_path, WORK[:1], act=wait_to_be_killed)
    wait_until(lambda: list(tmp_path.glob("*.begun")))
    begun = []

    def kill_at_the_last(name):
        begun.append(name)
        if name == WORK[-1]:
            killed.kill()

    work_together(tmp_path, act=kill_at_the_last)
    assert begun == [*WORK[1:], WORK[0]]
    end(killed, code=-signal.SIGKILL)


def test_work_is_taken_over_while_other_work_takes_long(tmp_path):
    """Two processes hold the first two pieces, and the second one is killed."""
    held = start(work_together, tmp_path, WORK[:1], act=wait_to_be_killed)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 1)
    killed = start(work_together, tmp_path, WORK[1:2], act=wait_to_be_killed)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    third = start(work_together, tmp_path, WORK[:2])
    killed.kill()
    wait_until(lambda: done_in(folder_at(tmp_path)) == [WORK[1]])
    held.kill()
    end(third)
    assert done_in(folder_at(tmp_path)) == [WORK[1], WORK[0]]


def test_all_are_killed_but_one(tmp_path):
    end(*[start(work_together, tmp_path, act=kill) for _ in range(3)], code=-9)
    assert done_in(folder_at(tmp_path)) == []
    end(start(work_together, tmp_path))
    assert done_in(folder_at(tmp_path)) == WORK


def test_an_error_ends_one_process_and_frees_its_work(tmp_path):
    def fail(name):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        work_together(tmp_path, act=fail)
    end(start(work_together, tmp_path))
    assert done_in(folder_at(tmp_path)) == WORK


def append_many(path, writer, count):
    folder = folder_at(path)
    for number in range(count):
        text = chr(ord("a") + writer) * LONG
        append(folder, "rows.jsonl", {"writer": writer, "n": number, "text": text})


@pytest.mark.slow
def test_rows_of_several_processes_are_whole(tmp_path):
    writers, count = 4, 500
    end(*[start(append_many, tmp_path, writer, count) for writer in range(writers)])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))  # refuses what is not whole
    assert all(len(set(row["text"])) == 1 for row in rows)
    found = collections.defaultdict(list)
    for row in rows:
        found[row["writer"]].append(row["n"])
    assert found == {writer: list(range(count)) for writer in range(writers)}


######## The folder ###################################################################


def open_shared(path, on_wait=None):
    return open_run_folder(path, "study", {"a": 1}, resume=True, on_wait=on_wait)


def hold(path, seconds):
    with open_shared(path, on_wait=lambda: None) as folder:
        folder.start()
        (path / "held").touch()
        time.sleep(seconds)


def test_a_folder_is_waited_for_and_said_to_be(tmp_path):
    holder = start(hold, tmp_path / "study", LIMIT)
    wait_until((tmp_path / "study" / "held").exists)
    with pytest.raises(Exception, match="is in use"), open_shared(tmp_path / "study"):
        pass
    with open_shared(tmp_path / "study", on_wait=holder.kill) as folder:
        assert folder.is_started
    end(holder, code=-signal.SIGKILL)


def test_a_shared_folder_is_free_within_the_block_alone(tmp_path):
    with open_shared(tmp_path) as folder:
        folder.start()
        with folder.shared(), open_shared(tmp_path, on_wait=pytest.fail):
            pass
        with pytest.raises(Exception, match="is in use"), open_shared(tmp_path):
            pass


def test_an_error_does_not_wait_for_the_folder(tmp_path):
    """Another process has the folder, so a wait for it would not end."""
    with contextlib.suppress(KeyError), open_shared(tmp_path) as folder:
        folder.start()
        with folder.shared():
            holder = start(hold, tmp_path, LIMIT)
            wait_until((tmp_path / "held").exists)
            raise KeyError
    holder.kill()
    end(holder, code=-signal.SIGKILL)
