"""How several processes share the runs of a study.

All of them see one folder. A process claims a run by a lock on a file, trains it and
appends its row. The system releases the locks of a process that ends, however it ends,
so another one takes over what it had begun.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import filelock

from train.output.run_folder import RunFolder

_CLAIMS = ".claims"
# Seconds between two looks at what the other processes have claimed.
_POLL = 0.2


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
    finished = done()
    left = {
        name: _lock(folder, hashlib.sha256(name.encode()).hexdigest()[:16])
        for name in work
        if name not in finished
    }
    while left:
        for name, claim in tuple(left.items()):
            try:
                claimed = claim.acquire(timeout=0)
            except filelock.Timeout:
                continue
            with claimed:
                if name not in done():
                    work[name]()
            del left[name]
        if left:
            time.sleep(_POLL)


def append(folder: RunFolder, name: str, record: dict[str, Any]) -> None:
    """Appends a record to a JSON Lines file, while no other process does."""
    with _lock(folder, "append"):
        folder.append(name, record)


def _lock(folder: RunFolder, name: str) -> filelock.BaseFileLock:
    claims = folder.path / _CLAIMS
    claims.mkdir(exist_ok=True)
    return filelock.FileLock(claims / f"{name}.lock")
