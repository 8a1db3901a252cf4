"""Checkpoints, the one record of where a run stands.

A checkpoint holds the arrays of a state, and a JSON object about it. Orbax writes it to
a temporary folder, which is renamed when everything is on disk. So a process that is
killed at any moment leaves a whole checkpoint or none. All is written before `save`
returns: a failure is an error there, and there is no thread that could fail unnoticed.

Orbax stores parameters without checksums and does not notice when they change on disk,
and it reports other damage in pages of messages. So a digest of every file is saved
too, and verified before Orbax reads any file. To read a checkpoint changes nothing in
the folder, so a run can be looked at while it trains.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.errors import UsageError, see
from train.files import digest, sync

Tree = Any

_ABOUT = "about.json"
_DIGESTS = "digests.json"
# Orbax writes these after the digests; nothing that matters is in them.
_LATE = {"_CHECKPOINT_METADATA", "commit_success.txt"}
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_REMOVED = ".removed"


class CheckpointError(UsageError):
    """Raised if a checkpoint cannot be written, or if none can be read."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified when it was found.

    Attributes:
      folder: its folder.
      about: the JSON object that was saved with it.
    """

    folder: Path
    about: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps that the state has taken."""
        return int(self.folder.name)

    def read(self, like: Tree, *, partial: bool = False) -> Tree:
        """Reads the arrays, bit for bit as they were saved.

        If a run has several processes, each of them must call this.

        Args:
          like: arrays with the structure, shapes and dtypes that were saved, or their
            `jax.ShapeDtypeStruct`s; arrays are restored to its shardings. PRNG keys
            must have JAX's default implementation.
          partial: whether `like` may be a part of what was saved, with None elsewhere.

        Raises:
          CheckpointError: if other names, shapes or dtypes were saved.
        """
        handler = ocp.StandardCheckpointHandler()
        target, saved = _arrays(like), handler.metadata(self.folder).tree
        names = list(target)
        if partial:  # Orbax reads all arrays or none
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            for name in saved.keys() - target.keys():
                x = saved[name]
                target[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
        there, here = _signature(saved), _signature(target)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise CheckpointError(
                    f"checkpoint {self.folder} is from another program: {name} is "
                    f"{there.get(name, 'absent')} in the checkpoint and "
                    f"{here.get(name, 'absent')} in this run"
                    + see("training.md#when-something-happens")
                )
        arrays = handler.restore(self.folder, args=ocp.args.StandardRestore(target))
        leaves, structure = jax.tree.flatten(like)
        restored = [
            jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, restored)


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps whose checkpoints are in a folder, in increasing order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def find_checkpoint(
    folder: Path, *, warn: Callable[[str], None], identity: Mapping[str, Any]
) -> Checkpoint | None:
    """Returns the newest checkpoint that is whole and belongs to a run.

    If a run has several processes, each of them must call this.

    Args:
      folder: the folder of the checkpoints.
      warn: called with a line about each checkpoint that is skipped.
      identity: entries that the JSON object about the checkpoint must have.

    Returns:
      The checkpoint; None if there is none.

    Raises:
      CheckpointError: if there are checkpoints but all are damaged.
    """
    problems: list[str] = []
    for step in reversed(checkpoint_steps(folder)):
        path = folder / str(step)
        about, problem = _verify(path, {"step": step, **identity})
        if not problem:
            for line in problems:
                warn(f"{line}: going on from step {step}")
            return Checkpoint(path, about)
        if path.exists():  # a run in progress removes old ones
            problems.append(f"checkpoint {path} is damaged ({problem})")
    if problems:
        raise CheckpointError(
            f"{', '.join(problems)} and there is no other: put back a copy of one, or "
            "remove the run folder to start again"
        )
    return None


class CheckpointWriter:
    """Writes checkpoints to a folder, and keeps the newest ones.

    If a run has several processes, each of them must call every method, with the same
    global arrays and a folder that all share.
    """

    def __init__(self, folder: Path, *, saved: int | None = None, keep: int = 2):
        """Opens a folder, and removes what a killed process left half-written.

        Args:
          folder: the folder of the checkpoints; it is made if it does not exist.
          saved: the step that training continues from, which is not saved again.
          keep: how many checkpoints to keep; older ones are removed, and so are those
            of later steps, which training has left behind.

        Raises:
          CheckpointError: if the folder cannot be made.
        """
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        self._folder = folder.absolute()
        self._saved = saved
        self._keep = keep
        self._handler = _Handler()
        self._writer = ocp.Checkpointer(self._handler)
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            for pattern in (_TEMPORARY, f"*{_REMOVED}"):
                for path in self._mine(self._folder.glob(pattern)):
                    shutil.rmtree(path)

    def save(self, step: int, state: Tree, about: Mapping[str, Any]) -> None:
        """Writes a state, unless it is the one that was saved last.

        If there are several processes, the first one removes old checkpoints, and may
        still do so when the others go on.

        Args:
          step: number of steps that the state has taken.
          state: the arrays.
          about: a JSON object to save with them.

        Raises:
          CheckpointError: if the checkpoint cannot be written.
        """
        if step == self._saved:
            return
        path = self._folder / str(step)
        with self._writing():
            arrays = _arrays(state)
            self._handler.about = {"step": step, **about}
            self._check_room(sum(x.nbytes for x in arrays.values()))
            # One that exists is damaged: training would have continued from it.
            self._writer.save(path, args=_Save(arrays), force=True)
            self._saved = step
            if jax.process_index() == 0:  # another would meet what this one removes
                self._remove_earlier(step)
                sync(self._folder)

    def _remove_earlier(self, step: int) -> None:
        steps = checkpoint_steps(self._folder)
        kept = [s for s in steps if s <= step][-self._keep :]
        for other in steps:
            if other not in kept:
                self._remove(self._folder / str(other))

    def _mine(self, work: Any) -> Any:
        """Returns the work if this process is the one that does it, else none."""
        return list(work) if jax.process_index() == 0 else []

    def _remove(self, path: Path) -> None:
        # A reader finds all of it or nothing.
        removed = path.with_name(f"{path.name}{_REMOVED}")
        path.rename(removed)
        shutil.rmtree(removed)

    def _check_room(self, num_bytes: int) -> None:
        """Raises an OSError if the disk is too full; Orbax would print many pages."""
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes:
            sizes = f"{num_bytes / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free"
            raise OSError(errno.ENOSPC, sizes)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of writing into a CheckpointError."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another process is gone
            raise
        except Exception as error:  # from the file system or TensorStore
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"cannot write a checkpoint to {self._folder} ({reason}): make room "
                "there, or make the folder writable, and start the run again"
            ) from error


class _Handler(ocp.StandardCheckpointHandler):
    """Adds a JSON object, and a digest of each file, before a checkpoint is renamed."""

    about: Mapping[str, Any]

    def finalize(self, directory: Path) -> None:
        super().finalize(directory)
        folder = Path(directory)
        _write(folder / _ABOUT, self.about)
        digests = {name: digest(folder / name) for name in _files(folder)}
        _write(folder / _DIGESTS, digests)


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    """The arrays that `_Handler` saves."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """The arrays that `_Handler` restores; Orbax wants such a class too."""


def _files(folder: Path) -> list[str]:
    """Names the files of a checkpoint that have a digest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in paths]
    return [name for name in names if name not in _LATE | {_DIGESTS}]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n")
    sync(path)


def _verify(folder: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the JSON object about a checkpoint, and its problem; "" for none.

    A problem that one process finds is one for all.
    """
    about, problem = {}, ""
    try:
        digests = json.loads((folder / _DIGESTS).read_bytes())
        for name in sorted({*digests, *_files(folder)}):
            if digest(folder / name) != digests.get(name):
                problem = f"{name} has changed"
                break
        else:
            about = json.loads((folder / _ABOUT).read_bytes())
            for key, expected in identity.items():
                if about.get(key) != expected:
                    problem = f"it was saved for another {key}"
                    break
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error) or repr(error)
    if multihost_utils.process_allgather(np.bool_(problem)).any():
        return {}, problem or "another process cannot read it"
    return about, ""


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Drops the log messages of Orbax, which also raises its errors."""
    return "/orbax/" not in record.pathname


def _is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by name, with keys as their data."""
    return {
        jax.tree_util.keystr(path): _key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _key_data(key: jax.Array | jax.ShapeDtypeStruct) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _signature(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}
