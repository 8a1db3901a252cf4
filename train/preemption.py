"""Ending a run in good order when the machine is wanted for something else."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# As sysexits.h has it: a failure that a later try may not meet.
EXIT_CODE = 75


class PreemptedError(Exception):
    """The run was told to end, and saved where it stands."""


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM instead of ending the process.

    Yields:
      A function to be called now and then, in all processes of a run equally often:
      whether the run is to save and end. It says so to all of them at the same call.
    """
    if jax.process_count() > 1:
        # JAX catches the signal, and agrees among the processes on when to stop.
        calls = iter(range(2**31))
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
