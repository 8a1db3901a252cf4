"""Processes of tests have everything imported, whichever test starts the first."""

import sys

from tests.forked import IMPORTED, processes


def _send_modules(pipe):
    pipe.send(sys.modules.keys() & set(IMPORTED))


def test_processes_start_with_everything_imported():
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_send_modules, args=(theirs,))
    process.start()
    assert ours.recv() == set(IMPORTED)
    process.join()
