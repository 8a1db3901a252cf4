"""Processes that start at once: with everything imported, and before JAX's backend.

All tests of a process share the server that forks them, so all name here what it is to
import.
"""

import multiprocessing

IMPORTED = (
    *("tests.failpoints", "benchmarks.studies.compare"),
    *("train.__main__", "train.data", "train.output.checkpoints", "train.predict"),
    *("sklearn.datasets", "tensorboardX"),
)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(list(IMPORTED))
