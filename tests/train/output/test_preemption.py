"""Graceful shutdown: when a run is told to end."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from train.output.preemption import preemption


def test_the_signal_is_noted_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as preempted:
        assert not preempted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted()
        assert preempted()
    assert signal.getsignal(signal.SIGTERM) == before


def test_several_processes_are_told_until_they_can_end(monkeypatch):
    # JAX says it at one call alone.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda call: call == 1
    )
    with preemption() as preempted:
        assert [preempted() for _ in range(4)] == [False, True, True, True]
