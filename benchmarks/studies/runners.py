"""The processes that share a study with the command that began it.

On one machine each has one core, as small networks use a second one badly. On several
machines they are workers of a Ray cluster. All of them write to the same folder.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax

from benchmarks.studies.config import CompareConfig
from train.compilation_cache import keep_compiled_programs
from train.cpu import set_up_cpu
from train.errors import UsageError

Join = Callable[[CompareConfig, Path], None]

# What the workers of a cluster need to know of this process.
_VARIABLES = ("TFDS_DATA_DIR", "XLA_FLAGS")


@contextlib.contextmanager
def runners(config: CompareConfig, run_dir: Path, join: Join) -> Iterator[None]:
    """Starts the other processes of a study, and ends them with the block.

    The caller has the lock of the folder, so that it plans the study while the others
    start. At the end of the block all work is done, or this process has failed.

    Args:
      config: the settings; `runners` counts this process too.
      run_dir: the folder of the study.
      join: trains runs of the study in another process.

    Raises:
      UsageError: if Ray is needed, and not installed or not there.
    """
    work = functools.partial(
        _begin,
        join,
        dataclasses.replace(config, runners=1, ray=None),
        run_dir.absolute(),
        bool(jax.config.values["jax_compilation_cache_dir"]),
    )
    others = config.runners - 1
    if not others:
        yield
    elif config.ray is None:
        with _on_cores(others, work):
            yield
    else:
        with _on_ray(config.ray, others, work):
            yield


def _begin(join: Join, config: CompareConfig, run_dir: Path, keeps: bool) -> None:
    """Does what another process does; it keeps compiled programs as this one does."""
    set_up_cpu()
    if keeps:
        keep_compiled_programs()
    join(config, run_dir)


@contextlib.contextmanager
def _on_cores(count: int, work: Callable[[], None]) -> Iterator[None]:
    cores = _cores()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_pinned, args=(cores[i % len(cores)], work))
        for i in range(1, count + 1)
    ]
    for process in processes:
        process.start()
    _pin({cores[0]})  # before JAX starts its threads
    try:
        yield
    finally:
        _pin(cores)
        for process in processes:
            process.terminate()
            process.join()


def _cores() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # on macOS, which pins no process


def _pin(cores: Collection[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _pinned(core: int, work: Callable[[], None]) -> None:
    """Works on one core, until the process that has started this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _pin({core})
    work()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _on_ray(address: str, count: int, work: Callable[[], None]) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 20, each half a minute
    try:
        import ray
    except ImportError:
        raise UsageError(
            "ray is not installed: pip install --group ray, or leave --ray out and "
            "start the same command with the same --run-dir on each machine"
        ) from None
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        _check_port(address)
        cluster = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": variables},
        )
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"no Ray cluster at {address} ({reason}): start one with `ray start "
            "--head`, or leave --ray out"
        ) from error
    with cluster:
        remote = ray.remote(num_cpus=1, max_retries=0)(_call)
        tasks = [remote.remote(work) for _ in range(count)]
        yield
        del tasks  # Ray shows the errors of those that have failed


def _call(work: Callable[[], None]) -> None:
    """Does some work; Ray takes functions alone."""
    work()


def _check_port(address: str) -> None:
    """Raises OSError if nothing listens there; Ray would try it for long.

    Args:
      address: HOST:PORT, perhaps after ray://; others are left to Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
