"""How fast images come to the training step, and what their way costs the step.

First, each way is timed without training. Besides the two loaders of the project these
are plain decoding by PIL, a loader in NumPy and, where it is installed, tf.data. Then a
training step with each loader is compared with the same step on one constant batch that
is on the device already.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import models
from benchmarks.report import open_report, rows_of, with_range
from benchmarks.timing import Ratio, interleave, ratio
from optax_tricks.nnx import split
from train import data
from train.data.config import DataConfig
from train.data.images import decode
from train.data.loaders import (
    Batch,
    GrainLoader,
    InMemoryLoader,
    Loader,
    default_workers,
)
from train.data.samplers import RandomSampler
from train.progress import shown_on
from train.settings import Positive, settings
from train.step import Trainable, init_state, make_train_step
from train.tasks.base import Networks
from train.tasks.classification import Classification, ClassificationConfig
from train.tasks.segmentation import Segmentation, SegmentationConfig

Call: TypeAlias = Callable[[], Any]
Calls: TypeAlias = dict[str, Call]
ImageTask: TypeAlias = Classification | Segmentation

_PACKAGES = ("pillow", "grain", "tensorflow-datasets", "tensorflow-cpu")

_MODEL = "resnet20"

# The most batches that threads, processes and the device hold together.
_READ_AHEAD = 12


class _Segmenter(models.Network):
    """A small network at stride 8."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        sizes = itertools.pairwise((3, 32, 64, 128))
        down = [nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs) for i, o in sizes]
        wide = [
            nnx.Conv(128, 128, (3, 3), kernel_dilation=2, rngs=rngs) for _ in range(6)
        ]
        self.layers = nnx.List(down + wide)
        self.head = nnx.Conv(128, num_classes, (1, 1), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of every pixel."""
        x = images
        for layer in self.layers:
            x = nnx.relu(layer(x))
        logits = self.head(x)
        shape = (*images.shape[:3], logits.shape[-1])
        resized: jax.Array = jax.image.resize(logits, shape, "bilinear")
        return resized


class _SmallSegmentation(Segmentation):
    """Segmentation with a network that leaves time to see what the input costs."""

    __slots__ = ()

    def create_networks(self, rngs: nnx.Rngs) -> Networks:
        """Makes the network."""
        return {"model": _Segmenter(len(self.class_names), rngs=rngs)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A dataset and the training that it feeds.

    Attributes:
      config: the data, their augmentation and the batch size.
      task: the task that trains on it.
      batches: number of batches that are timed together without training.
      steps: number of training steps that are timed together.
    """

    config: ClassificationConfig | SegmentationConfig
    task: type[ImageTask]
    batches: int = 40
    steps: int = 3


def _subjects(
    cifar10: str, camvid: str, data_dir: Path | None
) -> tuple[Subject, Subject]:
    def data_config(dataset: str, *augment: str) -> DataConfig:
        return DataConfig(dataset=dataset, augment=augment, data_dir=data_dir)

    return (
        Subject(
            config=ClassificationConfig(
                data=data_config(cifar10, "pad_crop", "random_flip"),
                model=_MODEL,
                batch_size=128,
            ),
            task=Classification,
        ),
        Subject(
            config=SegmentationConfig(
                data=data_config(camvid, "random_scale_crop", "random_flip"),
                batch_size=4,
            ),
            task=_SmallSegmentation,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results; seconds are per batch or step."""

    dataset: str
    part: str
    name: str
    batch_size: int
    seconds: float
    images_per_second: float
    ratio: Ratio


class _Feeding:
    """A dataset and what reads it in the functions to time.

    Attributes:
      subject: the dataset, and what it is for.
      train: the training examples.
      task: the task, for these data.
      sampler: the order of the examples.
    """

    def __init__(self, subject: Subject, stack: contextlib.ExitStack):
        """Loads the data; the stack closes what is opened later."""
        config = subject.config
        dataset = config.data.load(config.task)
        self.subject = subject
        self.train = dataset.split("train")
        self.task: ImageTask = subject.task.create(config, dataset)  # type: ignore[arg-type]
        self.sampler = RandomSampler((0, 0), len(self.train), config.batch_size)
        self._stack = stack

    def open(self) -> dict[str, tuple[Loader, Iterator[Any]]]:
        """Returns the loaders of the project, and what they feed."""
        workers = default_workers()
        loaders: dict[str, Loader] = {
            "in memory": InMemoryLoader(self.train.arrays()),
            "grain, threads": GrainLoader(self.train, num_workers=0),
            f"grain, {workers} process{'es' * (workers > 1)}": GrainLoader(self.train),
        }
        return {
            name: (loader, self.closing(loader.feeds(self.sampler)))
            for name, loader in loaders.items()
        }

    def closing(self, feeds: Any) -> Iterator[Any]:
        """Returns a generator, which is closed at the end."""
        iterator: Iterator[Any] = self._stack.enter_context(contextlib.closing(feeds))
        return iterator


def _loader_calls(feeding: _Feeding) -> tuple[Calls, Calls]:
    """Returns functions that make batches, and functions that empty their buffers."""
    train, batches = feeding.train, feeding.subject.batches
    calls: Calls = {}
    before: Calls = {}
    for name, (loader, feeds) in feeding.open().items():
        calls[name] = _batches_call(feeding, loader, feeds)
        if isinstance(loader, GrainLoader):
            before[name] = _drain(feeds)
    calls["PIL, decoding alone"] = _decoding_call(train, feeding.sampler, batches)
    calls["NumPy, from memory"] = _numpy_call(train, feeding.sampler, batches)
    if importlib.util.find_spec("tensorflow"):
        stream = feeding.closing(_tf_batches(train, feeding.sampler.batch_size))
        calls["tf.data"] = lambda: list(itertools.islice(stream, batches))
        before["tf.data"] = _drain(stream)
    return calls, before


def _drain(feeds: Iterator[Any]) -> Call:
    """Returns a function that takes what was read ahead while others ran."""
    return lambda: list(itertools.islice(feeds, _READ_AHEAD))


def _batches_call(feeding: _Feeding, loader: Loader, feeds: Iterator[Any]) -> Call:
    """Returns a function that makes augmented batches, as training does."""
    make = jax.jit(
        lambda feed, step, key: feeding.task.prepare(loader.batch(feed, step), key)
    )
    key, steps = jax.random.key(0), enumerate(feeds)

    def call() -> Any:
        found = itertools.islice(steps, feeding.subject.batches)
        return [make(feed, jnp.int32(step), key) for step, feed in found]

    return call


def _decoding_call(train: data.Split, sampler: RandomSampler, batches: int) -> Call:
    """Returns a function that only decodes the images of batches."""
    steps = itertools.count()
    fields = [f for f in train.reader.fields.values() if f.kind != "label"]

    def call() -> Any:
        for step in itertools.islice(steps, batches):
            records = train.records.__getitems__(sampler.rows(step).tolist())
            for field in fields:
                for record in records:
                    decode(record[field.feature], field.channels)

    return call


def _numpy_call(train: data.Split, sampler: RandomSampler, batches: int) -> Call:
    """Returns a function that gathers and augments batches with NumPy."""
    arrays = {
        name: np.array(array)
        for name, array in train.arrays().items()
        if train.reader.fields[name].kind != "label"
    }
    steps = itertools.count()
    random = np.random.default_rng(0)
    height, width = train.reader.size

    def change(batch: np.ndarray, y: int, x: int, flipped: np.ndarray) -> np.ndarray:
        pad = ((0, 0), (4, 4), (4, 4), *((0, 0),) * (batch.ndim - 3))
        batch = np.pad(batch, pad)[:, y : y + height, x : x + width]
        batch[flipped] = batch[flipped, :, ::-1]
        return (batch / np.float32(255) - np.float32(0.5)) * np.float32(4)

    def call() -> Any:
        for step in itertools.islice(steps, batches):
            rows = sampler.rows(step)
            y, x = random.integers(0, 9, 2)
            flipped = random.random(len(rows)) < 0.5
            for array in arrays.values():
                change(array[rows], y, x, flipped)

    return call


def _tf_batches(train: data.Split, batch_size: int) -> Generator[Any, None, None]:
    """Yields batches that tf.data decodes and crops, as its guide does."""
    tf: Any = importlib.import_module("tensorflow")
    fields = [f for f in train.reader.fields.values() if f.kind != "label"]
    num = min(len(train), 10_000)
    records = train.records.__getitems__(list(range(num)))
    height, width = train.reader.size

    def load(*encoded: Any) -> Any:
        images = [
            tf.io.decode_image(value, field.channels, expand_animations=False)
            for value, field in zip(encoded, fields, strict=True)
        ]
        joint = tf.pad(tf.concat(images, -1), ((4, 4), (4, 4), (0, 0)))
        channels = sum(field.channels for field in fields)
        joint = tf.image.random_crop(joint, (height, width, channels))
        joint = tf.image.random_flip_left_right(joint)
        return (tf.cast(joint, tf.float32) / 255 - 0.5) * 4

    stream = tf.data.Dataset.from_tensor_slices(
        tuple([record[field.feature] for record in records] for field in fields)
    )
    stream = stream.shuffle(num).repeat()
    stream = stream.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    stream = stream.batch(batch_size, drop_remainder=True)
    yield from stream.prefetch(2).as_numpy_iterator()


def _step_calls(feeding: _Feeding) -> tuple[Calls, Calls]:
    """Returns training steps on a constant batch and with each loader.

    The second result has functions that empty the buffers of the loaders.
    """
    task = feeding.task
    batch = jax.device_put(feeding.train.read(feeding.sampler.rows(0)))
    ready = jax.jit(task.prepare)(batch, jax.random.key(0))
    unchanged = dataclasses.replace(task, augment=lambda key, batch: batch)
    calls = {
        "constant batch": _step_call(
            unchanged, itertools.repeat(ready), lambda feed, step: feed
        )
    }
    before: Calls = {}
    for name, (loader, feeds) in feeding.open().items():
        calls[name] = _step_call(task, feeds, loader.batch)
        if isinstance(loader, GrainLoader):
            before[name] = _drain(feeds)
    steps = feeding.subject.steps
    return {name: _repeated(call, steps) for name, call in calls.items()}, before


def _step_call(
    task: ImageTask, feeds: Iterator[Any], make_batch: Callable[..., Batch]
) -> Call:
    """Returns a function that takes one training step."""
    networks = task.create_networks(nnx.Rngs(0))
    tx = optax.with_extra_args_support(optax.sgd(0.01, momentum=0.9))
    trainables = {name: Trainable(split(n)[0], tx) for name, n in networks.items()}
    train_step = make_train_step(task, trainables)
    state = init_state(networks, trainables, jax.random.key(0))
    step = jax.jit(
        lambda state, feed: train_step(state, make_batch(feed, state.step)),
        donate_argnums=0,
    )

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, next(feeds))
        return metrics

    return call


def _repeated(call: Call, times: int) -> Call:
    return lambda: [call() for _ in range(times)]


def measure(subject: Subject, rounds: int) -> list[Measurement]:
    """Times loading without training, then training steps, on one dataset."""
    config, measurements = subject.config, []
    for part, make_calls, reference, count in (
        ("input alone", _loader_calls, "in memory", subject.batches),
        ("training step", _step_calls, "constant batch", subject.steps),
    ):
        with contextlib.ExitStack() as stack:
            calls, before = make_calls(_Feeding(subject, stack))
            seconds = interleave(calls, rounds, before)
        for name, times in seconds.items():
            each = statistics.median(times) / count
            measurements.append(
                Measurement(
                    dataset=config.data.dataset,
                    part=part,
                    name=name,
                    batch_size=config.batch_size,
                    seconds=each,
                    images_per_second=config.batch_size / each,
                    ratio=ratio(times, seconds[reference]),
                )
            )
    return measurements


@settings
class InputConfig:
    """Time each way to load images, and what it costs the training step."""

    cifar10: str = "image_folder/cifar10"
    """Name of a prepared dataset of small images, to classify."""
    camvid: str = "camvid"
    """Name of a prepared dataset of larger images, to segment."""
    rounds: Positive[int] = 10
    """Number of rounds; each way is timed once in a round."""
    data_dir: Path | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""


def input(
    config: Annotated[InputConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Time each way to load images, and what it costs the training step.

    Args:
      config: what to time.
      run_dir: folder of the results; a new one under runs/ if unset.
    """
    for name in (config.cifar10, config.camvid):  # before anything is timed
        data.open_prepared(name, data_dir=config.data_dir)
    described = dataclasses.asdict(config)
    with open_report("input", described, run_dir) as report:
        report.folder.start()
        measurements = []
        subjects = _subjects(config.cifar10, config.camvid, config.data_dir)
        with shown_on(report.console)("timing", len(subjects)) as reporter:
            for subject in subjects:
                measurements += measure(subject, config.rounds)
                reporter.advance()
        versions = {name: _version(name) for name in _PACKAGES}
        report.save_rows(rows_of(measurements, versions))
        for title, group in itertools.groupby(measurements, _title):
            report.show(_HEADER, list(map(_cells, group)), title)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _title(m: Measurement) -> str:
    return f"{m.dataset}: {m.part}"


_HEADER = ("way", "images/s", "ms/batch", "time to first [10 %, 90 %]")


def _cells(m: Measurement) -> tuple[str, ...]:
    return (
        m.name,
        f"{m.images_per_second:,.0f}",
        f"{1000 * m.seconds:.1f}",
        with_range(*m.ratio),
    )
