"""How batches come to the training step: from the device's memory, or as a stream.

Both ways give the same batches in the same order. An order says which examples are in
a step, from the number of the step alone; so the position of a run is its step, and a
run that starts again at a step goes on as if it had never stopped.
"""

import atexit
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.data._dataset import Arrays, Split
from train.parallel import put, replicated
from train.errors import UsageError
from train.progress import Progress, silent

Batch = dict[str, jax.Array]

# Parameters, activations and XLA's own buffers need the rest.
_SHARE_OF_DEVICE = 0.25
_MAX_WORKERS = 8
_ENDLESS = 1 << 31


class Order(Protocol):
    """Which examples are in which step."""

    num_examples: int
    batch_size: int

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before this one, which counts from 0."""

    def rows(self, step: int) -> np.ndarray:
        """Numbers of the examples in a step, int (batch_size,); -1 for none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shuffled:
    """A new random order in each epoch, for training.

    Every example is met exactly once in an epoch. Where the batch size does not divide
    the examples, a batch takes the last ones of one epoch and the first of the next.

    >>> order = Shuffled(seed=(0,), num_examples=5, batch_size=2)
    >>> [order.steps_before(epoch) for epoch in range(3)]
    [0, 2, 5]
    >>> sorted(int(row) for step in range(5) for row in order.rows(step))
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    Attributes:
      seed: numbers that decide the order.
      num_examples: all examples.
      batch_size: examples in a step.
    """

    seed: tuple[int, ...]
    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.num_examples:
            raise UsageError(
                f"batch size {self.batch_size} must be from 1 to the "
                f"{self.num_examples} training examples: choose another --batch-size"
            )

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before this one."""
        return epoch * self.num_examples // self.batch_size

    def rows(self, step: int) -> np.ndarray:
        """Numbers of the examples in a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, self.num_examples)
        first, last = (
            _permutation(self.seed, int(epoch), self.num_examples)[places]
            for epoch in (epochs[0], epochs[-1])
        )
        return np.where(epochs == epochs[0], first, last)


@functools.lru_cache(maxsize=4)
def _permutation(seed: tuple[int, ...], epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((*seed, epoch)).permutation(length)


@dataclasses.dataclass(frozen=True, slots=True)
class Sequential:
    """The same order in each epoch, for evaluation; the last batch is filled up.

    >>> order = Sequential(num_examples=3, batch_size=2)
    >>> order.rows(0).tolist(), order.rows(1).tolist()
    ([0, 1], [2, -1])

    Attributes:
      num_examples: all examples.
      batch_size: examples in a step.
    """

    num_examples: int
    batch_size: int

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before this one."""
        return epoch * math.ceil(self.num_examples / self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Numbers of the examples in a step; -1 where there are no more."""
        start = step % self.steps_before(1) * self.batch_size
        rows = np.arange(start, start + self.batch_size)
        return np.where(rows < self.num_examples, rows, -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """The orders of several runs, of equally many examples, beside each other.

    Attributes:
      orders: one for each run.
    """

    orders: tuple[Order, ...]

    @property
    def num_examples(self) -> int:
        """All examples."""
        return self.orders[0].num_examples

    @property
    def batch_size(self) -> int:
        """Examples in a step of each run."""
        return self.orders[0].batch_size

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before this one."""
        return self.orders[0].steps_before(epoch)

    def rows(self, step: int) -> np.ndarray:
        """Numbers of the examples in a step, int (runs, batch_size)."""
        return np.stack([order.rows(step) for order in self.orders])


class Input(Protocol):
    """Examples on their way to the step.

    What `feeds` yields is passed to the jitted step, where `batch` makes a batch of it:
    the examples' arrays, and "weight", float32 (batch,), 0 where there is no example.

    Attributes:
      num_examples: all examples.
      seeds_axes: where the axis of the runs is in what `feeds` yields for `Together`,
        as `jax.vmap` takes it; None if runs cannot be fed together.
    """

    num_examples: int
    seeds_axes: Any

    def feeds(self, order: Order, first_step: int = 0) -> Iterator[Any]:
        """What each step needs, without end, from a step on."""

    def feed_shapes(self, order: Order) -> Any:
        """The shapes and dtypes of what `feeds` yields."""

    def batch(self, feed: Any, step: jax.Array) -> Batch:
        """The batch of a step; pure, to be called inside the jitted step."""


class _ResidentFeed(NamedTuple):
    data: Batch
    rows: jax.Array
    first_step: jax.Array


class Resident:
    """Examples in the memory of the device; a batch is gathered inside the step.

    In an epoch nothing moves between host and device: the order of its steps is put
    there before.

    >>> import jax.numpy as jnp, numpy as np
    >>> from train.data.inputs import Resident, Shuffled
    >>> squares = Resident({"x": np.arange(4) ** 2})
    >>> feeds = squares.feeds(Shuffled(seed=(0,), num_examples=4, batch_size=4))
    >>> batch = squares.batch(next(feeds), jnp.int32(0))
    >>> sorted(batch["x"].tolist())
    [0, 1, 4, 9]

    Attributes:
      num_examples: all examples.
      data: their arrays on the devices.
    """

    seeds_axes = _ResidentFeed(data=None, rows=1, first_step=None)

    def __init__(self, arrays: Mapping[str, np.ndarray], mesh: Mesh | None = None):
        """Puts arrays of equal length on every device of a mesh, or on the first."""
        self.num_examples = len(next(iter(arrays.values())))
        self._sharding = replicated(mesh or _first_device())
        self.data = put(dict(arrays), self._sharding)

    def feeds(self, order: Order, first_step: int = 0) -> Iterator[_ResidentFeed]:
        """The data and the order of the epoch; the same objects in all its steps."""
        epoch = 0
        while order.steps_before(epoch + 1) <= first_step:
            epoch += 1
        while True:
            start, stop = order.steps_before(epoch), order.steps_before(epoch + 1)
            rows = np.zeros((_most_steps(order), *order.rows(start).shape), np.int32)
            for step in range(start, stop):
                rows[step - start] = order.rows(step)
            feed = _ResidentFeed(
                self.data, *put((rows, np.int32(start)), self._sharding)
            )
            for _ in range(max(start, first_step), stop):
                yield feed
            epoch += 1

    def feed_shapes(self, order: Order) -> _ResidentFeed:
        """The shapes and dtypes of what `feeds` yields."""
        rows = (_most_steps(order), *order.rows(0).shape)
        feed = jax.eval_shape(
            lambda: _ResidentFeed(self.data, jnp.zeros(rows, jnp.int32), jnp.int32(0))
        )
        return _placed(feed, self._sharding)

    def batch(self, feed: _ResidentFeed, step: jax.Array) -> Batch:
        """Gathers the examples of a step."""
        rows = feed.rows[step - feed.first_step]
        batch = jax.tree.map(lambda x: x[rows], feed.data)
        return batch | {"weight": (rows >= 0).astype(jnp.float32)}


def _placed(shapes: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )


def _first_device() -> Mesh:
    return jax.make_mesh(
        (1,), ("data",), (AxisType.Auto,), devices=jax.local_devices()[:1]
    )


def _most_steps(order: Order) -> int:
    return math.ceil(order.num_examples / order.batch_size)


class Stream:
    """Examples decoded while training runs, by Grain's threads or processes.

    Batches are read ahead, and two of them wait on the devices, cut along "data". With
    several JAX processes each reads its own part of every batch.

    Attributes:
      num_examples: all examples, over all processes.
    """

    seeds_axes = None

    def __init__(
        self,
        split: Split,
        mesh: Mesh | None = None,
        *,
        num_workers: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Reads nothing yet.

        Args:
          split: the examples.
          mesh: whose devices share a batch; the first one alone if unset.
          num_workers: processes that decode; 0 for threads of this one; unset for as
            many as the machine's cores let.
          process_index: number of this JAX process; JAX's own if unset.
          process_count: how many there are; JAX's own if unset.
        """
        if num_workers is not None and num_workers < 0:
            raise UsageError(f"workers must be 0 or more, got {num_workers}")
        self.num_examples = len(split)
        self._split = split
        self._sharding = NamedSharding(mesh or _first_device(), P("data"))
        self._num_workers = default_workers() if num_workers is None else num_workers
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        self._shard = (index, count)

    def feeds(self, order: Order, first_step: int = 0) -> Iterator[Batch]:
        """Batches on the device, each when it is ready."""
        import grain  # takes a second, which the other way need not wait

        batches = _Batches(self._split, order, first_step, *self._shard)
        num_threads = 1 if self._num_workers else min(os.cpu_count() or 1, _MAX_WORKERS)
        # Elements are whole batches: Grain's own 500 of them would fill the memory.
        reading = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=num_threads
        )
        stream = grain.MapDataset.source(batches).to_iter_dataset(reading)
        if self._num_workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # Grain reads one to start processes
            options = grain.MultiprocessingOptions(num_workers=self._num_workers)
            # A copy lets go of the memory that is shared with the process at once.
            stream = stream.mp_prefetch(options).map(
                functools.partial(jax.tree.map, np.array)
            )
        # Once before the transfer, once behind it.
        ahead = functools.partial(
            grain.experimental.ThreadPrefetchIterDataset, prefetch_buffer_size=2
        )
        stream = ahead(ahead(stream).map(self._on_devices))
        iterator = iter(stream)
        close = functools.partial(_close, iterator, self._num_workers)
        # An evaluation's stream stays open for the next one, and ends with the process.
        atexit.register(close)
        try:
            yield from iterator
        finally:
            atexit.unregister(close)
            close()

    def _on_devices(self, batch: Arrays) -> Batch:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding, x), batch
        )

    def feed_shapes(self, order: Order) -> Batch:
        """The shapes and dtypes of what `feeds` yields."""
        _local_size(order, self._shard[1])  # refuses what processes cannot share
        size = order.batch_size
        shapes = {
            name: jax.ShapeDtypeStruct((size, *shape), dtype)
            for name, (shape, dtype) in self._split.reader.spec.items()
        }
        shapes |= {"weight": jax.ShapeDtypeStruct((size,), jnp.float32)}
        return _placed(shapes, self._sharding)

    def batch(self, feed: Batch, step: jax.Array) -> Batch:
        """The batch, which is complete already."""
        del step
        return feed


def _close(iterator: Any, num_workers: int) -> None:
    """Ends worker processes, and frees the memory shared with them."""
    iterator.close()
    if num_workers:
        # Grain frees a batch when its last reference goes, in a thread that the end of
        # this process would cut off with a warning.
        gc.collect()
        time.sleep(0.2)


@dataclasses.dataclass(frozen=True, slots=True)
class _Batches:
    """A random-access source for Grain, of whole batches."""

    split: Split
    order: Order
    first_step: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Arrays:
        size = _local_size(self.order, self.process_count)
        rows = self.order.rows(self.first_step + index)
        rows = rows[self.process_index * size :][:size]
        there = rows >= 0
        arrays = {
            name: np.zeros((size, *shape), dtype)
            for name, (shape, dtype) in self.split.reader.spec.items()
        }
        if there.any():
            for name, array in self.split.read(rows[there]).items():
                arrays[name][there] = array
        return arrays | {"weight": there.astype(np.float32)}


def _local_size(order: Order, process_count: int) -> int:
    if order.batch_size % process_count:
        raise UsageError(
            f"batch size {order.batch_size} must be a multiple of the {process_count} "
            "processes"
        )
    return order.batch_size // process_count


def default_workers() -> int:
    """Processes to decode in: one core stays with the training."""
    return min((os.cpu_count() or 1) - 1, _MAX_WORKERS)


def open_inputs(
    splits: Mapping[str, Split],
    mesh: Mesh | None = None,
    *,
    mode: str = "auto",
    num_workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, Input]:
    """Makes the inputs of a run, all of one kind.

    Args:
      splits: by any names.
      mesh: the devices that share the work; the first one alone if unset.
      mode: "resident", "stream", or "auto": resident if the decoded examples of all
        splits take no more than a quarter of the device's memory.
      num_workers: of streams, see `Stream`.
      progress: shows how far decoding is.
    """
    if mode not in ("auto", "resident", "stream"):
        raise UsageError(f"input must be auto, resident or stream, got {mode!r}")
    num_bytes = sum(split.num_bytes for split in splits.values())
    fits = num_bytes <= _SHARE_OF_DEVICE * device_bytes()
    if mode == "resident" or (mode == "auto" and fits):
        return {name: Resident(s.arrays(progress), mesh) for name, s in splits.items()}
    return {
        name: Stream(s, mesh, num_workers=num_workers) for name, s in splits.items()
    }


def device_bytes() -> int:
    """Memory of the first device: its own, or for CPUs the machine's."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return memory.get("bytes_limit") or (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
