"""The processes that share a study with the command that began it.

On one machine each has one core, as small networks use a second one badly. On several
machines they are workers of a Ray cluster. All of them write to the same folder.
"""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.studies.config import CompareConfig
from train.errors import UsageError

Join = Callable[[CompareConfig, Path], None]

# Seconds that a process has to end after the study is finished.
_PATIENCE = 30.0


@contextlib.contextmanager
def runners(config: CompareConfig, run_dir: Path, join: Join) -> Iterator[None]:
    """Starts the other processes of a study, and ends them with the block.

    Args:
      config: the settings; `runners` counts this process too.
      run_dir: the folder of the study.
      join: trains runs of the study in another process.

    Raises:
      UsageError: if Ray is needed and not installed.
    """
    if config.runners == 1:
        yield
        return
    alone = dataclasses.replace(config, runners=1, ray=None)
    if config.ray is not None:
        with _on_ray(config.ray, config.runners - 1, alone, run_dir.absolute(), join):
            yield
        return
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_pinned, args=(cores[i % len(cores)], join, alone, run_dir)
        )
        for i in range(1, config.runners)
    ]
    for process in processes:
        process.start()
    os.sched_setaffinity(0, {cores[0]})  # before JAX starts its threads
    try:
        yield
        for process in processes:
            process.join(_PATIENCE)
    finally:
        os.sched_setaffinity(0, cores)
        for process in processes:
            process.terminate()
            process.join()


def _pinned(core: int, join: Join, config: CompareConfig, run_dir: Path) -> None:
    os.sched_setaffinity(0, {core})
    join(config, run_dir)


@contextlib.contextmanager
def _on_ray(
    address: str, count: int, config: CompareConfig, run_dir: Path, join: Join
) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise UsageError(
            "ray is not installed: pip install --group ray, or leave --ray out and "
            "start the same command with the same --run-dir on each machine"
        ) from None
    with ray.init(address=address, log_to_driver=False):
        remote = ray.remote(num_cpus=1, max_retries=0)(join)
        tasks = [remote.remote(config, run_dir) for _ in range(count)]
        yield
        ray.wait(tasks, num_returns=count, timeout=_PATIENCE)
