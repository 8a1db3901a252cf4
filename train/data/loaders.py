"""Loaders, which bring batches to the training step from memory or from disk.

All loaders give the same batches in the same order, which a sampler decides.
"""

import atexit
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from train.data.dataset import Arrays, Split
from train.data.samplers import Sampler
from train.errors import UsageError, see
from train.parallel import put, replicated
from train.progress import Progress, silent

T = TypeVar("T")
Batch = dict[str, jax.Array]

# Parameters, activations and buffers of XLA need the rest.
_SHARE_OF_DEVICE = 0.25
_MAX_WORKERS = 8
# Grain needs a length, and no run has as many steps.
_ENDLESS = 1 << 31


class Loader(Protocol):
    """The interface of a loader, which brings examples to the jitted step.

    The step takes a value that `feeds` yields. Inside the step, `batch` turns this
    value into a dict of arrays whose first axis counts examples.

    Attributes:
      num_examples: number of all examples.
    """

    num_examples: int

    def feeds(self, sampler: Sampler, first_step: int = 0) -> Generator[Any]:
        """Yields the input of each step, from `first_step` on and without end."""

    def abstract_feed(self, sampler: Sampler) -> Any:
        """Returns the shapes, dtypes and shardings of what `feeds` yields."""

    def batch(self, feed: Any, step: Int[jax.Array, ""]) -> Batch:
        """Returns the batch of a step; pure, to be called inside the jitted step.

        Where the sampler has no example, the batch holds any example, or zeros.
        """


class InMemoryFeed(NamedTuple):
    """The input of a step from an `InMemoryLoader`.

    Attributes:
      data: the arrays of all examples.
      rows: numbers of the examples in each step of the epoch, int32 (steps, batch).
      first_step: number of the first step of the epoch, int32 ().
    """

    data: Batch
    rows: Int[jax.Array, "steps batch"]
    first_step: Int[jax.Array, ""]


class InMemoryLoader:
    """Keeps all examples in the memory of the devices.

    A batch is gathered inside the jitted step. Nothing moves between host and device
    during an epoch: the order of its examples is put on the devices before it starts.

    >>> import jax.numpy as jnp, numpy as np
    >>> from train.data.loaders import InMemoryLoader
    >>> from train.data.samplers import RandomSampler
    >>> squares = InMemoryLoader({"x": np.arange(4) ** 2})
    >>> feeds = squares.feeds(RandomSampler(seed=(0,), num_examples=4, batch_size=4))
    >>> batch = squares.batch(next(feeds), jnp.int32(0))
    >>> sorted(batch["x"].tolist())
    [0, 1, 4, 9]

    Attributes:
      num_examples: number of all examples.
      data: the arrays of all examples, on the devices.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], mesh: Mesh | None = None):
        """Puts arrays of equal length on every device of a mesh, or on the first."""
        self.num_examples = len(next(iter(arrays.values())))
        self._sharding = replicated(mesh or _first_device())
        self.data: Batch = put(dict(arrays), self._sharding)

    def feeds(self, sampler: Sampler, first_step: int = 0) -> Generator[InMemoryFeed]:
        """Yields the data and their order; the same arrays in each step of an epoch."""
        epoch = 0
        while sampler.steps_before(epoch + 1) <= first_step:
            epoch += 1
        while True:
            start, stop = sampler.steps_before(epoch), sampler.steps_before(epoch + 1)
            rows = np.zeros((_most_steps(sampler), sampler.batch_size), np.int32)
            for step in range(start, stop):
                rows[step - start] = sampler.rows(step)
            feed = InMemoryFeed(
                self.data, *put((rows, np.int32(start)), self._sharding)
            )
            for _ in range(max(start, first_step), stop):
                yield feed
            epoch += 1

    def abstract_feed(self, sampler: Sampler) -> InMemoryFeed:
        """Returns the shapes, dtypes and shardings of what `feeds` yields."""
        rows = (_most_steps(sampler), sampler.batch_size)
        feed: InMemoryFeed = jax.eval_shape(
            lambda: InMemoryFeed(self.data, jnp.zeros(rows, jnp.int32), jnp.int32(0))
        )
        return _placed(feed, self._sharding)

    def batch(self, feed: InMemoryFeed, step: Int[jax.Array, ""]) -> Batch:
        """Gathers the examples of a step."""
        rows = feed.rows[step - feed.first_step]
        return {name: array[rows] for name, array in feed.data.items()}


def _placed(shapes: T, sharding: NamedSharding) -> T:
    placed: T = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return placed


def _first_device() -> Mesh:
    return jax.make_mesh(
        (1,), ("data",), (AxisType.Auto,), devices=jax.local_devices()[:1]
    )


def _most_steps(sampler: Sampler) -> int:
    """Returns the largest number of steps in an epoch."""
    return math.ceil(sampler.num_examples / sampler.batch_size)


class GrainLoader:
    """Decodes examples while training runs, in threads or processes of Grain.

    Batches are read ahead, and two of them wait on the devices, sharded along "data".
    With several JAX processes, each reads its own part of every batch.

    Attributes:
      num_examples: number of all examples, over all processes.
    """

    def __init__(
        self,
        split: Split,
        mesh: Mesh | None = None,
        *,
        num_workers: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Opens the loader, which reads nothing before `feeds` is called.

        Args:
          split: the examples.
          mesh: the devices that share a batch; the first one alone if unset.
          num_workers: number of processes that decode, 0 for threads of this process;
            `default_workers()` if unset.
          process_index: number of this JAX process; taken from JAX if unset.
          process_count: number of JAX processes; taken from JAX if unset.
        """
        if num_workers is not None and num_workers < 0:
            raise UsageError(f"num_workers must be at least 0, got {num_workers}")
        cores = os.cpu_count() or 1
        most = max(_MAX_WORKERS, 2 * cores)
        if num_workers is not None and num_workers > most:
            raise UsageError(
                f"num_workers must be at most {most} on {cores} cores, got "
                f"{num_workers}: {default_workers()}, the default, leaves one core for "
                "training"
            )
        self.num_examples = len(split)
        self._split = split
        self._sharding = NamedSharding(mesh or _first_device(), P("data"))
        self._num_workers = default_workers() if num_workers is None else num_workers
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        self._shard = (index, count)

    def feeds(self, sampler: Sampler, first_step: int = 0) -> Generator[Batch]:
        """Yields batches that are on the devices already."""
        import grain  # importing it takes a second, which only this loader needs

        batches = _Batches(self._split, sampler, first_step, *self._shard)
        num_threads = 1 if self._num_workers else min(os.cpu_count() or 1, _MAX_WORKERS)
        # An element is a whole batch: the 500 that Grain would buffer fill the memory.
        reading = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=num_threads
        )
        stream = grain.MapDataset.source(batches).to_iter_dataset(reading)
        if self._num_workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # Grain reads one of its flags
            options = grain.MultiprocessingOptions(num_workers=self._num_workers)
            # After the copy, the memory shared with the worker can be freed at once.
            stream = stream.mp_prefetch(options).map(
                functools.partial(jax.tree.map, np.array)
            )
        # One buffer before the transfer to the devices, and one after it.
        ahead = functools.partial(
            grain.experimental.ThreadPrefetchIterDataset, prefetch_buffer_size=2
        )
        stream = ahead(ahead(stream).map(self._on_devices))
        iterator = iter(stream)
        close = functools.partial(_close, iterator, self._num_workers)
        # The stream of an evaluation stays open for the next one, at most until the
        # process ends.
        atexit.register(close)
        try:
            yield from iterator
        finally:
            atexit.unregister(close)
            close()

    def _on_devices(self, batch: Arrays) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(self._sharding, array)
            for name, array in batch.items()
        }

    def abstract_feed(self, sampler: Sampler) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of what `feeds` yields."""
        _local_size(sampler, self._shard[1])  # refuses what processes cannot share
        shapes = {
            name: jax.ShapeDtypeStruct((sampler.batch_size, *shape), dtype)
            for name, (shape, dtype) in self._split.reader.spec.items()
        }
        return _placed(shapes, self._sharding)

    def batch(self, feed: Batch, step: Int[jax.Array, ""]) -> Batch:
        """Returns the feed, which is the batch."""
        del step
        return feed


def _close(iterator: Any, num_workers: int) -> None:
    """Ends worker processes and frees the memory shared with them."""
    iterator.close()
    if num_workers:
        # Grain frees a batch in a thread once nothing refers to it. If this process
        # ended before that, there would be a warning.
        gc.collect()
        time.sleep(0.2)


@dataclasses.dataclass(frozen=True, slots=True)
class _Batches:
    """A random-access source of whole batches for Grain."""

    split: Split
    sampler: Sampler
    first_step: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Arrays:
        size = _local_size(self.sampler, self.process_count)
        first = self.process_index * size
        step = self.first_step + index
        rows = self.sampler.rows(step)[first : first + size]
        there = np.flatnonzero(rows >= 0)
        arrays = {
            name: np.zeros((size, *shape), dtype)
            for name, (shape, dtype) in self.split.reader.spec.items()
        }
        if there.size:
            generators = None
            if self.split.reader.random_crop is not None:
                generators = [self._generator(step, first + int(i)) for i in there]
            for name, array in self.split.read(rows[there], generators).items():
                arrays[name][there] = array
        return arrays

    def _generator(self, step: int, place: int) -> np.random.Generator:
        """Returns the generator of the example at a place in the whole batch."""
        seeds = np.random.SeedSequence(self.sampler.seed, spawn_key=(step, place))
        return np.random.default_rng(seeds)


def _local_size(sampler: Sampler, process_count: int) -> int:
    if sampler.batch_size % process_count:
        raise UsageError(
            f"batch_size must be a multiple of {process_count}, the number of "
            f"processes, got {sampler.batch_size}"
            + see("machines.md#one-run-on-all-of-them")
        )
    return sampler.batch_size // process_count


def default_workers() -> int:
    """Returns the number of decoding processes that leaves one core for training."""
    return min((os.cpu_count() or 1) - 1, _MAX_WORKERS)


def open_loaders(
    splits: Mapping[str, Split],
    mesh: Mesh | None = None,
    *,
    mode: str = "auto",
    num_workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, Loader]:
    """Opens the loaders of a run, all of one kind.

    Args:
      splits: the splits to load, by any names.
      mesh: the devices that share the work; the first one alone if unset.
      mode: "memory", "grain" or "auto", which keeps the examples in memory if the
        decoded examples of all splits fit in `memory_limit()`.
      num_workers: passed to `GrainLoader`.
      progress: shows how far decoding is.

    Returns:
      A loader for each split, by the same names.

    Raises:
      UsageError: if the mode is not one of these, or if it is "memory" and a reader
        crops at random.
    """
    if mode not in ("auto", "memory", "grain"):
        raise UsageError(f"loader must be 'auto', 'memory' or 'grain', got {mode!r}")
    if any(split.reader.random_crop is not None for split in splits.values()):
        if mode == "memory":
            raise UsageError(
                "random_resized_crop cuts images that differ in size while they are "
                'decoded, so they cannot be kept in memory: set loader to "auto" or '
                '"grain"' + see("data.md#sizes-and-augmentation")
            )
        mode = "grain"
    if mode == "auto":
        num_bytes = sum(split.num_bytes for split in splits.values())
        mode = "memory" if num_bytes <= memory_limit() else "grain"
    if mode == "memory":
        return {
            name: InMemoryLoader(split.arrays(progress), mesh)
            for name, split in splits.items()
        }
    return {
        name: GrainLoader(split, mesh, num_workers=num_workers)
        for name, split in splits.items()
    }


def memory_limit() -> float:
    """Returns how many bytes of examples may be kept in memory, a quarter of it.

    The other three quarters are left to the network and its training.
    """
    return _SHARE_OF_DEVICE * device_bytes()


def device_bytes() -> int:
    """Returns the memory of the first device in bytes; on CPUs, of the machine."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return memory.get("bytes_limit") or (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
