"""Ends a program at a named point: just before one of its file events.

A point is named after the event, the file in the run folder, and how often that has
happened in this process: "append metrics.jsonl 2" is the moment before the second
record is added to `metrics.jsonl`. So a test meets the same moment on any machine, idle
or busy. "half append metrics.jsonl 2" is the moment when half of it is on disk.

Events may happen in threads of Orbax. Only those below the run folder count.

A process that is killed leaves the files that it had at that moment. So `copy_at_each`,
which copies them at each point of one process, shows what a kill at each would leave,
without a process for each.
"""

import atexit
import collections
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure

from tests.forked import processes
from train.output import checkpoints
from train.output.run_folder import RunFolder

LIMIT = 600  # seconds for what takes a few on an idle machine


def kill() -> None:
    """Ends the process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Tells the process to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    """Does what Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate_one_of_several() -> None:
    """Tells this process to end, and waits until the others have been told so."""
    terminate()
    client = jax._src.distributed.global_state.client
    client.blocking_key_value_get("RECEIVED_PREEMPTION_NOTICE", 1000 * LIMIT)


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


class Started:
    """A process that has started, and may be joined by others."""

    def __init__(
        self,
        work: Callable[[], None],
        folder: Path,
        scratch: Path,
        *,
        at: str | None = None,
        action: Callable[[], None] = kill,
    ):
        """Starts work in its own process.

        Args:
          work: what to do; it can be pickled, and its module starts no backend.
          folder: the run folder; the events in it are points.
          scratch: a folder for compiled programs, which a killed process may damage.
          at: the point to act at, if any.
          action: what to do there.
        """
        compiled = scratch / "compiled"
        self._files = Path(tempfile.mkdtemp(dir=scratch))
        self._at = at
        arguments = (work, folder, self._files, compiled, at, action)
        self._process = processes.Process(target=_begin, args=arguments)
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.is_alive()

    def end(self) -> Ended:
        """Waits for the end of the process."""
        self._process.join(LIMIT)
        output = self._files / "output.txt"
        if self._process.exitcode is None:
            self.kill()
            pytest.fail(f"did not end, acting at {self._at}: {output.read_text()}")
        points = (self._files / "points.txt").read_text().splitlines()
        return Ended(self._process.exitcode, output.read_text(), points)

    def kill(self) -> None:
        """Ends the process if it is alive."""
        self._process.kill()
        self._process.join()


def call(
    work: Callable[[], None],
    folder: Path,
    scratch: Path,
    *,
    at: str | None = None,
    action: Callable[[], None] = kill,
) -> Ended:
    """Does work in its own process, as described for `Started`."""
    return Started(work, folder, scratch, at=at, action=action).end()


def copy_at_each(work: Callable[[], None], folder: Path, copies: Path) -> None:
    """Does work in this process, and copies the run folder at each of its points.

    Args:
      work: what to do.
      folder: the run folder.
      copies: a folder for the copies; each is named by the place of its point among the
        points, from 0. There is none where the run folder was not there yet.
    """
    numbers = itertools.count()

    def copy(point: str) -> None:
        number = next(numbers)
        if folder.exists():
            shutil.copytree(folder, copies / str(number), copy_function=_copy_if_there)

    points.watch(copy)
    work()


def _copy_if_there(source: str, target: str) -> None:
    """Copies a file, unless a thread of TensorStore has just renamed it."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


def _begin(
    work: Callable[[], None],
    folder: Path,
    files: Path,
    compiled: Path,
    at: str | None,
    action: Callable[[], None],
) -> None:
    with (files / "output.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    global points
    points = _Points(folder, files / "points.txt", at, action)
    points.install()
    try:
        work()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves that out


points: "_Points"  # of this process


class _Points:
    """Wraps the functions that change files, and acts at one point."""

    def __init__(
        self, folder: Path, log: Path, at: str | None, action: Callable[[], None]
    ):
        self._folder, self._at, self._action = folder, at, action
        self._watch: Callable[[str], None] | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        # Written without a buffer, which a killed process would take with it.
        self._log = log.open("wb", buffering=0)

    def act(self, at: str, action: Callable[[], None]) -> None:
        """Acts at another point, and counts events from the beginning again."""
        self._at, self._action = at, action
        self._counts.clear()

    def watch(self, watch: Callable[[str], None]) -> None:
        """Calls a function with the name of each point, while others wait."""
        self._watch = watch

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
        handler = checkpoints._Handler
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

    def _meet(
        self,
        event: str,
        path: Path | None,
        halfway: Callable[..., contextlib.AbstractContextManager] = nullcontext,
    ) -> None:
        if path is None or not Path(path).is_relative_to(self._folder):
            return
        name = f"{event} {Path(path).relative_to(self._folder)}"
        name = re.sub(r"(\.partial-)\w+|(\.safetensors\.)\d+", r"\1\2*", name)
        with self._lock:
            self._counts[name] += 1
            point = f"{name} {self._counts[name]}"
            self._log.write(f"{point}\n".encode())
            if self._watch:
                with halfway():
                    self._watch(point)
        if point == self._at:
            with halfway():
                self._action()

    def _path_of(self, descriptor: int) -> Path | None:
        """Returns the file or folder in the run folder that is open as this."""
        found = os.fstat(descriptor)
        for path in (self._folder, *self._folder.rglob("*")):
            # TensorBoard's files are named by the time.
            if "tensorboard" not in path.parts and os.path.samestat(found, path.stat()):
                return path
        return None


# What is on disk halfway through an event. A process that goes on does the whole event,
# which makes good what the half has written or removed, but for appending.


@contextlib.contextmanager
def _append_half(folder: RunFolder, name: str, record: dict) -> Iterator[None]:
    line = json.dumps(record).encode()
    with (folder.path / name).open("ab") as file:
        size = file.tell()
        file.write(line[: len(line) // 2])
    yield
    os.truncate(folder.path / name, size)


@contextlib.contextmanager
def _write_half(path: Path, text: str, *_, **__) -> Iterator[None]:
    path.write_bytes(text.encode()[: len(text) // 2])
    yield


@contextlib.contextmanager
def _draw_half(figure: Figure, path: Path, **options) -> Iterator[None]:
    file = io.BytesIO()
    figure.canvas.print_figure(file, **options)
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    yield


@contextlib.contextmanager
def _remove_half(path: Path, *_, **__) -> Iterator[None]:
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()
    yield
