"""Ends a program at a named point: just before one of its file events.

A point is named after the event, the file in the run folder, and how often that has
happened in this process: "append metrics.jsonl 2" is the moment before the second
record is added to `metrics.jsonl`. So a test meets the same moment on any machine, idle
or busy. "half append metrics.jsonl 2" is the moment when half of it is on disk.

Events may happen in threads of Orbax. Only those below the run folder count.
"""

import collections
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure

from train.output import checkpoints
from train.output.run_folder import RunFolder

LIMIT = 600  # seconds for what takes a few on an idle machine

# Processes start at once, with everything imported, and before JAX starts its backend.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["tests.failpoints", "train.__main__", "train.predict"]
    + ["sklearn.datasets", "tensorboardX"]
)


def kill() -> None:
    """Ends the process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Tells the process to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    """Fails as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
      code: its exit code; minus a signal if that has ended it.
      output: what it printed.
      points: the points that it met, in order.
    """

    code: int
    output: str
    points: list[str]

    @property
    def words(self) -> str:
        """What it printed, without the line breaks of a terminal."""
        return " ".join(self.output.split())


def call(
    work: Callable[[], None],
    folder: Path,
    scratch: Path,
    *,
    at: str | None = None,
    action: Callable[[], None] = kill,
) -> Ended:
    """Does work in a process of its own.

    Args:
      work: what to do; it can be pickled.
      folder: the run folder; the events in it are points.
      scratch: a folder for compiled programs, which a killed process may damage.
      at: the point to act at, if any.
      action: what to do there.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    output, points = scratch / "output.txt", scratch / "points.txt"
    arguments = (work, folder, scratch, at, action)
    process = _processes.Process(target=_begin, args=arguments)
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"did not end, acting at {at}: {output.read_text()}")
    return Ended(process.exitcode, output.read_text(), points.read_text().splitlines())


def _begin(
    work: Callable[[], None],
    folder: Path,
    scratch: Path,
    at: str | None,
    action: Callable[[], None],
) -> None:
    with (scratch / "output.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(scratch / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _Points(folder, scratch / "points.txt", at, action).install()
    work()


class _Points:
    """Wraps the functions that change files, and acts at one point."""

    def __init__(
        self, folder: Path, log: Path, at: str | None, action: Callable[[], None]
    ):
        self._folder, self._at, self._action = folder, at, action
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        # Written without a buffer, which a killed process would take with it.
        self._log = log.open("wb", buffering=0)

    def install(self) -> None:
        """Wraps the functions, for the rest of the life of the process."""
        self._wrap(os, "mkdir", lambda path, *_, **__: path)
        self._wrap(os, "replace", lambda source, target: target)
        self._wrap(os, "rename", lambda source, target: target)
        self._wrap(os, "fsync", self._path_of)
        self._wrap(shutil, "rmtree", lambda path, *_, **__: path, _remove_half)
        self._wrap(Path, "write_text", lambda path, *_, **__: path, _write_half)
        self._wrap(Figure, "savefig", lambda figure, path, **_: path, _draw_half)
        self._wrap(RunFolder, "append", lambda f, name, _: f.path / name, _append_half)
        handler = checkpoints._DigestingHandler
        self._wrap(handler, "finalize", lambda handler, path: path)

    def _wrap(self, owner, name, path_of, half=None) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            path = path_of(*args, **kwargs)
            self._meet(name, path)
            if half:
                self._meet(f"half {name}", path, lambda: half(*args, **kwargs))
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _meet(self, event: str, path: Path | None, before=lambda: None) -> None:
        if path is None or not Path(path).is_relative_to(self._folder):
            return
        name = f"{event} {Path(path).relative_to(self._folder)}"
        with self._lock:
            self._counts[name] += 1
            point = f"{name} {self._counts[name]}"
            self._log.write(f"{point}\n".encode())
        if point == self._at:
            before()
            self._action()

    def _path_of(self, descriptor: int) -> Path | None:
        """Returns the file at the top of the run folder that is open as this."""
        found = os.fstat(descriptor)
        for path in self._folder.iterdir():
            if os.path.samestat(found, path.stat()):
                return path
        return None


def _append_half(folder: RunFolder, name: str, record: dict) -> None:
    line = json.dumps(record).encode()
    with (folder.path / name).open("ab") as file:
        file.write(line[: len(line) // 2])


def _write_half(path: Path, text: str, *_, **__) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])


def _draw_half(figure: Figure, path: Path, **options) -> None:
    file = io.BytesIO()
    figure.canvas.print_figure(file, **options)
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


def _remove_half(path: Path, *_, **__) -> None:
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()
