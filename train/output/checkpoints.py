"""Checkpoints, which are written during training and verified when they are read.

Orbax writes each checkpoint to a temporary folder and renames it when everything is on
disk, so a process that is killed at any moment leaves a whole checkpoint or none. But
Orbax stores parameters without checksums and does not notice when they change on disk,
and it reports other damage in pages of messages. So a digest of every file is saved
too, and verified before Orbax reads any file.
"""

import contextlib
import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from train.errors import UsageError

Tree = Any

_ITEM = "state"
_DIGESTS = "digests.json"


class CheckpointError(UsageError):
    """Raised if a checkpoint cannot be written, or if none can be read."""


class Checkpoints(contextlib.AbstractContextManager):
    """The newest checkpoints of one seed, by step.

    If a run has several processes, each of them must call every method, with the same
    global arrays and a folder that all share.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        """Opens a folder, and removes what a killed process left half-written.

        Args:
          folder: the folder of the checkpoints; it is made if it does not exist.
          keep: how many checkpoints to keep; older ones are removed.

        Raises:
          CheckpointError: if the folder cannot be made.
        """
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        self._folder = folder.absolute()
        self._handler = _DigestingHandler()
        self._damaged: list[int] = []
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(_ITEM, ocp.args.StandardSave, self._handler)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no checkpoint: it may be damaged
            # In a thread, a failure to make folders would be noticed minutes later.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, handler_registry=registry
            )

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps whose checkpoints are on disk, in increasing order."""
        return sorted(ocp.utils.checkpoint_steps(self._folder))

    def save(self, step: int, state: Tree) -> None:
        """Copies a state to the host, and writes it in the background.

        This waits for the previous save first. A step on disk is not saved again.

        Args:
          step: number of steps that the state has taken.
          state: arrays; they may be donated as soon as this returns.

        Raises:
          CheckpointError: if this save cannot start, or the previous one failed.
        """
        self.wait()
        with self._writing():
            # `restore` skipped these; this save takes their place.
            while self._damaged:
                self._manager.delete(self._damaged.pop())
            if step not in self.steps():
                arrays = _arrays(state)
                self._check_room(sum(x.nbytes for x in arrays.values()))
                args = ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(arrays)})
                self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: if it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the threads of Orbax.

        Raises:
          CheckpointError: if the save failed.
        """
        with self._writing():
            self._manager.close()

    def restore(
        self, like: Tree, *, warn: Callable[[str], None], partial: bool = False
    ) -> tuple[int, Tree] | None:
        """Reads the newest checkpoint that is not damaged.

        Args:
          like: arrays with the structure, shapes and dtypes that were saved, or their
            `jax.ShapeDtypeStruct`s; arrays are restored to its shardings. PRNG keys
            must have JAX's default implementation.
          warn: called with a line about each damaged checkpoint that is skipped.
          partial: whether `like` may be a part of what was saved, with None elsewhere.

        Returns:
          The step and the state, bit for bit as it was saved; None if there is no
          checkpoint.

        Raises:
          CheckpointError: if there are checkpoints but all are damaged, or if the
            newest undamaged one has other names, shapes or dtypes than `like`.
        """
        self.wait()
        self._damaged = []
        problems: list[str] = []
        for step in reversed(self.steps()):
            folder = self._folder / str(step)
            problem = _damage(folder / _ITEM)
            if not problem:
                for line in problems:
                    warn(f"{line}: going on from step {step}")
                return step, self._read(folder / _ITEM, like, partial)
            self._damaged.append(step)
            problems.append(f"checkpoint {folder} is damaged ({problem})")
        if problems:
            raise CheckpointError(
                f"{', '.join(problems)} and there is no other: put back a copy of one, "
                "or remove the run folder to start again"
            )
        return None

    def _read(self, folder: Path, like: Tree, partial: bool) -> Tree:
        target, saved = _arrays(like), self._handler.metadata(folder).tree
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
                    f"checkpoint {folder.parent} is from another program: "
                    f"{name} is {there.get(name, 'missing')} in the checkpoint and "
                    f"{here.get(name, 'missing')} in this run: choose another run "
                    "folder"
                )
        # Not through the manager: if one process failed, the others would wait for it.
        arrays = self._handler.restore(folder, args=ocp.args.StandardRestore(target))
        leaves, structure = jax.tree.flatten(like)
        restored = [
            jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, restored)

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


class _DigestingHandler(ocp.StandardCheckpointHandler):
    """Adds a digest of each file before a checkpoint is renamed to its name."""

    def finalize(self, directory: Path) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {str(path.relative_to(folder)): _digest(path) for path in files}
        (folder / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


def _damage(folder: Path) -> str:
    """Describes damage to a checkpoint that any process finds; "" if there is none."""
    problem = ""
    try:
        for name, digest in json.loads((folder / _DIGESTS).read_bytes()).items():
            if _digest(folder / name) != digest:
                problem = f"{name} has changed"
                break
    except (OSError, ValueError) as error:
        problem = str(error)
    if multihost_utils.process_allgather(np.bool_(problem)).any():
        return problem or "another process cannot read it"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
