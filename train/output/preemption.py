"""Graceful shutdown on preemption (SIGTERM)."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: try again later.
EXIT_CODE = 75


class PreemptedError(Exception):
    """The run was told to end, and has saved its state."""


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM instead of ending the process.

    Yields:
      A function that says whether the run is to save its state and end. All processes
      of a run must call it equally often; it then tells all of them at the same call.
    """
    received: list[bool] = []
    if jax.process_count() > 1:
        # JAX catches the signal, and agrees among the processes on when to stop. It
        # says so once, and the caller may be unable to stop there.
        calls = iter(range(2**31))

        def preempted() -> bool:
            if multihost_utils.reached_preemption_sync_point(next(calls)):
                received.append(True)
            return bool(received)

        yield preempted
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
