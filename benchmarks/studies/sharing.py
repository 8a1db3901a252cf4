"""How several processes share the runs of a study.

All of them see one folder. A process claims a run by a lock on a file, trains it and
appends its row. The system releases the locks of a process that ends, however it ends,
so another one takes over what it had begun.
"""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from train.output.run_folder import RunFolder

_CLAIMS = ".claims"


def share(
    folder: RunFolder,
    work: Mapping[str, Callable[[], None]],
    done: Callable[[], Collection[str]],
) -> None:
    """Does every piece of work once, together with the other processes.

    Returns when all of it is done. What another process has begun is done here if that
    process ends before it is finished.

    Args:
      folder: the folder that the processes share.
      work: does a piece of work, by its name.
      done: returns the names of what is done, by any process.
    """
    for wait in (False, True):
        for name, do in work.items():
            if name in done():
                continue
            with _claim(folder.path, name, wait=wait) as is_mine:
                if is_mine and name not in done():
                    do()


def append(folder: RunFolder, name: str, record: dict[str, Any]) -> None:
    """Appends a record to a JSON Lines file, while no other process does."""
    with filelock.FileLock(folder.path / _CLAIMS / "append.lock"):
        folder.append(name, record)


@contextlib.contextmanager
def _claim(path: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Claims a piece of work; yields whether this process has it.

    Args:
      path: the folder.
      name: the name of the work.
      wait: whether to wait while another process has it.
    """
    file = hashlib.sha256(name.encode()).hexdigest()[:16]
    (path / _CLAIMS).mkdir(exist_ok=True)
    lock = filelock.FileLock(path / _CLAIMS / f"{file}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
