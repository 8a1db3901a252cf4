"""Signals: what ends at once, what ends gracefully, and with which exit code."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from train.signals import EXIT_CODES, StoppedError, graceful


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_is_noted_and_the_handler_put_back(number):
    before = signal.getsignal(number)
    seen = []
    signal.signal(number, lambda *_: seen.append(number))
    try:
        with contextlib.suppress(StoppedError), graceful() as told:
            assert told() == 0
            os.kill(os.getpid(), number)
            assert [told(), told()] == [number, number]
            raise StoppedError("saved", number)
        assert seen == []  # the caller has acted on it
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, before)


def test_a_signal_after_the_last_question_is_not_lost():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
    try:
        with graceful() as told:
            assert told() == 0
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["TERM"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_cannot_be_told():
    answers = []

    def ask():
        with graceful() as told:
            answers.append(told())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [0]


def test_several_processes_are_told_until_they_can_end(monkeypatch):
    # JAX says it at one call alone.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda call: call == 1
    )
    with graceful() as told:
        assert [told() for _ in range(4)] == [0, *[signal.SIGTERM] * 3]


# Neither ends before the signal comes.
WORK = {
    "imports": "threading.Lock().acquire() and threading.Event().wait()",
    # As while a program is compiled: Python runs none of its own instructions.
    "a long call": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


@pytest.mark.parametrize("number", EXIT_CODES)
@pytest.mark.parametrize("work", WORK)
def test_a_command_ends_at_once_while_there_is_nothing_to_save(number, work):
    start = (
        "import hashlib, threading; from train.signals import listen; listen(); "
        "print('ready', flush=True); "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start + WORK[work]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_CODES[number]
    assert error == "told to end; the same command starts again or goes on\n"
