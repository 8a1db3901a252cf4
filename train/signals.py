"""Graceful shutdown on SIGTERM (preemption) and SIGINT (Ctrl-C).

A command calls `listen` before anything else. From then on a signal ends it with a line
and the exit code of `EXIT_CODES`: at once while there is nothing to save, and within
`graceful` when the caller has saved. A second SIGINT always ends it at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_CODES = {
    int(signal.SIGTERM): 75,  # EX_TEMPFAIL of sysexits.h: try again later
    int(signal.SIGINT): 130,  # as a shell reports a command that Ctrl-C has ended
}

_received: list[int] = []
_graceful = threading.Event()


class StoppedError(Exception):
    """A signal has told the process to end, and what could be saved is saved.

    Attributes:
      exit_code: the exit code for a command that ends for this reason.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = EXIT_CODES[number]


def listen() -> None:
    """Ends this process on a signal, from now on.

    Python calls its own handlers between two of its instructions, so not while a
    program is compiled, which can take minutes. A thread has no such wait.
    """
    descriptor, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in EXIT_CODES:
        signal.signal(number, _note)
    threading.Thread(target=_watch, args=(descriptor,), daemon=True).start()


def _note(number: int, frame: object) -> None:
    _received.append(number)


def _watch(descriptor: int) -> None:
    interrupts = 0
    while True:
        number = os.read(descriptor, 1)[0]
        if number not in EXIT_CODES:
            continue
        interrupts += number == signal.SIGINT
        if _graceful.is_set() and interrupts < 2:
            continue
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # a progress bar has hidden the cursor
        os.write(2, b"told to end; the same command starts again or goes on\n")
        os._exit(EXIT_CODES[number])


@contextlib.contextmanager
def graceful() -> Iterator[Callable[[], int]]:
    """Notes signals instead of ending the process.

    Yields:
      A function that returns the number of the signal that told the process to end, and
      0 while there is none. The caller is then to save and to raise `StoppedError`. All
      processes of a run must call it equally often; it then tells all of them at the
      same call.
    """
    import jax  # after `listen`, as it takes seconds
    from jax.experimental import multihost_utils

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may set handlers
        return
    several = jax.process_count() > 1
    _received.clear()
    calls = iter(range(2**31))
    agreed = False  # among several processes

    def stopped() -> int:
        nonlocal agreed
        if several:
            # JAX says so once, and the caller may be unable to stop there.
            agreed |= multihost_utils.reached_preemption_sync_point(next(calls))
            return (_received or [int(signal.SIGTERM)])[0] if agreed else 0
        return _received[0] if _received else 0

    def note_and_tell_others(number: int, frame: object) -> None:
        # JAX catches SIGTERM, and agrees among the processes on when to stop.
        _note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers: dict[int, Callable[[int, object], None]] = (
        {signal.SIGINT: note_and_tell_others}
        if several
        else dict.fromkeys(EXIT_CODES, _note)
    )
    before = {number: signal.signal(number, f) for number, f in handlers.items()}
    _graceful.set()
    try:
        yield stopped
    finally:
        _graceful.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in _received:  # after the caller has asked for the last time
        os.kill(os.getpid(), number)
