"""The folder that a run or a study writes to."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax

from train.errors import UsageError, see
from train.files import digest, whole_file

CONFIG = "config.json"
SUMMARY = "summary.json"


# What reading JSON of another form raises.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_RESULTS = (".json", ".jsonl", ".png")


class RunFolderError(UsageError):
    """Raised if a run folder cannot be used."""


class RunFolder:
    """Writes the settings, records and results of a run to one folder.

    If there are several processes, only one of them writes, and all can read.

    Attributes:
      path: the folder.
      config: the settings of the run, as JSON values.
      writes: whether this process writes.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        writes: bool = True,
        lock: filelock.BaseFileLock | None = None,
    ):
        self.path = path
        self.config = config
        self.writes = writes
        self._lock = lock

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Lets other processes with the same settings use the folder within a block.

        At its end this process waits until it has the folder again. An error does not.
        """
        assert self._lock is not None
        self._lock.release()
        yield
        self._lock.acquire(timeout=-1)

    def start(self) -> None:
        """Writes the settings and the environment, which marks the folder as used."""
        self.write(CONFIG, {"config": self.config, "environment": environment()})

    @property
    def is_started(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / CONFIG).exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary, with the digests of all other results of the run."""
        names = {path.name for path in self.path.iterdir() if path.suffix in _RESULTS}
        names = names - {CONFIG, SUMMARY}
        files = {name: digest(self.path / name) for name in sorted(names)}
        self.write(SUMMARY, summary | {"files": files})

    def is_finished(self) -> bool:
        """Returns whether all results of the run are here as they were written."""
        try:
            files = read_summary(self.path)["files"]
            same = [digest(self.path / name) == saved for name, saved in files.items()]
            return bool(same) and all(same)
        except (OSError, *_MALFORMED):
            return False

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends a record to a JSON Lines file; it is on disk when this returns."""
        if not self.writes:
            return
        with (self.path / name).open("ab+") as file:
            # A killed process may have left half a line, which must not absorb this.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns the records of a JSON Lines file; skips a half-written last one."""
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def replace(self, name: str, records: list[dict[str, Any]]) -> None:
        """Replaces all records of a JSON Lines file, whole or not at all."""
        self.write_text(name, "".join(json.dumps(record) + "\n" for record in records))

    def write(self, name: str, content: Any) -> None:
        """Writes one JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes one file, whole or not at all."""
        if self.writes:
            with whole_file(self.path / name) as path:
                path.write_text(text, newline="")


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns the summary of a finished run; {} if there is none that can be read."""
    try:
        return dict(json.loads((folder / SUMMARY).read_bytes()))
    except (OSError, *_MALFORMED):
        return {}


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware, which are saved with all results."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
    }


def _commit() -> str:
    """Returns the commit, ending in "-dirty" if files but results differ from it."""
    code = (":(top)", ":(top,exclude)benchmarks/results")
    try:
        found = _git("describe", "--always", "--abbrev=12")
        changed = _git("diff", "--quiet", "HEAD", "--", *code).returncode == 1
    except OSError:
        return "unknown"
    commit = found.stdout.strip()
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return f"{len(models)} x {models[0]}" if models else platform.machine()


@contextlib.contextmanager
def open_run_folder(
    path: Path | None,
    name: str,
    config: dict[str, Any],
    *,
    resume: bool,
    writes: bool = True,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[RunFolder]:
    """Makes or reopens a run folder before any work is done, and locks it.

    Args:
      path: the folder, or None for a new one, `runs/<name>-<date>-<time>`.
      name: prefix of the name of a new folder.
      config: all settings; `RunFolder.start` writes them to `config.json`.
      resume: whether a run with the same settings may be continued.
      writes: whether this process writes, and locks the folder.
      on_wait: called before this process waits for another one that has the folder. If
        unset, it does not wait.

    Yields:
      The folder, which stays locked until the context ends.

    Raises:
      RunFolderError: if the folder cannot be written, is in use by another process,
        holds other files or other settings, or holds this run and `resume` is False.
    """
    config = json.loads(json.dumps(config, default=str))
    path = path or new_path(name)
    if not writes:
        if (path / CONFIG).exists():
            _check_contents(path, config, resume)
        yield RunFolder(path, config, writes=False)
        return
    lock = filelock.FileLock(path / ".lock")
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if on_wait is None:
                raise RunFolderError(
                    f"run folder {path} is in use by another process: wait for it, or "
                    "choose another run folder"
                ) from None
            if (path / CONFIG).exists():
                _check_contents(path, config, resume)
            on_wait()
            lock.acquire(timeout=-1)
    except OSError as error:
        raise RunFolderError(
            f"cannot write to run folder {path} ({error}): choose another run folder"
        ) from error
    try:
        _check_contents(path, config, resume)
        yield RunFolder(path, config, lock=lock)
    finally:
        lock.release()
        if new and not (path / CONFIG).exists():  # the run has not started
            (path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()


def new_path(name: str) -> Path:
    """Returns where a new run folder goes."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path("runs") / f"{name.replace('/', '-')}-{now}"


def _check_contents(path: Path, config: dict[str, Any], resume: bool) -> None:
    written = path / CONFIG
    if written.exists():
        try:
            found = json.loads(written.read_text())["config"]
        except _MALFORMED:
            raise RunFolderError(
                f"{written} was not written by a run: choose another run folder"
            ) from None
        if found != config:
            differences = _differences(found, config)
            raise RunFolderError(
                f"run folder {path} holds a run with other settings ({differences}): "
                "choose another run folder" + see("training.md#when-something-happens")
            )
        if not resume:
            raise RunFolderError(
                f"run folder {path} already holds this run: choose another run folder, "
                "or remove the folder to run again"
            )
    elif {child.name for child in path.iterdir()} - {".lock", f"{CONFIG}.part"}:
        raise RunFolderError(
            f"run folder {path} holds other files: choose another run folder"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [
            _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        return "; ".join(parts)
    return f"{name}: {found} in the folder, now {wanted}"
