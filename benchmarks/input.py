"""How fast images come to the training step, by each way, and what that costs it.

Images per second are of the input alone; beside the project's two ways stand plain
decoding by PIL, a loader in NumPy and, where it is installed, tf.data. Then a training
step with real input is held against the same step with one constant batch that lies
ready on the device.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.table import Table
from train.data._images import decode

from benchmarks.timing import Ratio, interleave, ratio
from optax_tricks.nnx import split
from train import data
from train.data import augment
from train.data.augment import Augmentation
from train.data.loaders import (
    GrainLoader,
    InMemoryLoader,
    Input,
    Shuffled,
    default_workers,
)
from train.errors import UsageError
from train.output.run_folder import environment, open_run_folder
from train.progress import make_console, shown_on
from train.step import Metrics, Models, Network, make_train_step, new_state
from train.tasks.classification import Classification, ClassificationConfig

Call = Callable[[], Any]

_PACKAGES = ("pillow", "grain", "tensorflow-datasets", "tensorflow-cpu")

_MODEL = "resnet20"

# Batches that threads, processes and the device hold together at most.
_READ_AHEAD = 12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A dataset to feed.

    Attributes:
      name: of the dataset.
      batch_size: images in a step.
      batches: of input alone, that are timed together.
      steps: of training, that are timed together.
      augment: what happens to a training batch.
      task: trains on it.
    """

    name: str
    batch_size: int
    batches: int
    steps: int
    augment: Callable[[data.Dataset], Augmentation]
    task: Callable[[data.Dataset, Augmentation], Any]


class _Segmenter(nnx.Module):
    """A small network at stride 8."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        sizes = itertools.pairwise((3, 32, 64, 128))
        down = [nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs) for i, o in sizes]
        wide = [
            nnx.Conv(128, 128, (3, 3), kernel_dilation=2, rngs=rngs) for _ in range(6)
        ]
        self.layers = nnx.List(down + wide)
        self.head = nnx.Conv(128, num_classes, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape
        for layer in self.layers:
            x = nnx.relu(layer(x))
        x = self.head(x)
        return jax.image.resize(x, (*shape[:3], x.shape[-1]), "bilinear")


@dataclasses.dataclass(frozen=True, slots=True)
class _Segmentation:
    """Enough of a task to take steps."""

    num_classes: int
    ignore_label: int
    augment: Augmentation

    def create_networks(self, rngs: nnx.Rngs) -> Models:
        return {"model": _Segmenter(self.num_classes, rngs=rngs)}

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Models, batch: Any
    ) -> tuple[jax.Array, Metrics]:
        labels = batch["mask"].astype(jnp.int32)
        there = labels != self.ignore_label
        losses = optax.softmax_cross_entropy_with_integer_labels(
            networks[name](batch["image"]), jnp.where(there, labels, 0)
        )
        return (losses * there).sum() / there.sum(), {}


def _subjects(cifar10: str, camvid: str) -> tuple[Subject, ...]:
    def for_cifar(dataset: data.Dataset) -> Augmentation:
        normalize = augment.normalize(dataset.mean, dataset.std)
        return augment.chain(augment.pad_crop(), augment.mirror(), normalize)

    def for_camvid(dataset: data.Dataset) -> Augmentation:
        size = dataset.split("train").reader.size
        void = dataset.ignore_label
        normalize = augment.normalize(dataset.mean, dataset.std)
        scale = augment.random_scale_crop(size, ignore_label=void)
        return augment.chain(scale, augment.mirror(), normalize)

    return (
        Subject(
            name=cifar10,
            batch_size=128,
            batches=40,
            steps=3,
            augment=for_cifar,
            task=lambda dataset, augment: Classification(
                config=ClassificationConfig(model=_MODEL),
                class_names=dataset.class_names,
                image_shape=(*dataset.split("train").reader.size, 3),
                augment=augment,
                normalize=augment,
            ),
        ),
        Subject(
            name=camvid,
            batch_size=4,
            batches=40,
            steps=3,
            augment=for_camvid,
            task=lambda dataset, augment: _Segmentation(
                dataset.num_classes, dataset.ignore_label, augment
            ),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results; seconds are of one batch or step."""

    dataset: str
    part: str
    name: str
    batch_size: int
    seconds: float
    images_per_second: float
    ratio: Ratio


def _ways(
    train: data.Split, order: Shuffled, stack: contextlib.ExitStack
) -> dict[str, tuple[Input, Iterator[Any]]]:
    """The project's ways of input, with what they feed."""
    processes = default_workers()
    ways: dict[str, Input] = {
        "memory": InMemoryLoader(train.arrays()),
        "stream, threads": GrainLoader(train, num_workers=0),
        f"stream, {processes} process{'es' * (processes > 1)}": GrainLoader(train),
    }
    return {
        name: (way, stack.enter_context(contextlib.closing(way.feeds(order))))
        for name, way in ways.items()
    }


def _loaders(
    dataset: data.Dataset, subject: Subject, stack: contextlib.ExitStack
) -> tuple[dict[str, Call], dict[str, Call]]:
    """What yields the next augmented batches of an epoch, and what empties buffers."""
    train = dataset.split("train")
    order = Shuffled((0, 0), len(train), subject.batch_size)
    change = jax.jit(subject.augment(dataset))
    calls, before = {}, {}
    for name, (way, feeds) in _ways(train, order, stack).items():
        calls[name] = _input_call(way, feeds, change, subject.batches)
        if isinstance(way, GrainLoader):
            before[name] = _drain(feeds)
    calls["PIL, decoding alone"] = _decoding_call(train, order, subject)
    calls["NumPy, from memory"] = _numpy_call(train, order, subject)
    if importlib.util.find_spec("tensorflow"):
        batches = stack.enter_context(contextlib.closing(_tf_batches(train, subject)))
        calls["tf.data"] = lambda: list(itertools.islice(batches, subject.batches))
        before["tf.data"] = _drain(batches)
    return calls, before


def _drain(feeds: Iterator[Any]) -> Call:
    """Takes what was read ahead while others had their turn."""
    return lambda: list(itertools.islice(feeds, _READ_AHEAD))


def _input_call(
    way: Input, feeds: Iterator[Any], change: Augmentation, batches: int
) -> Call:
    make = jax.jit(lambda feed, step, key: change(key, way.batch(feed, step)))
    key, steps = jax.random.key(0), enumerate(feeds)

    def call() -> Any:
        found = itertools.islice(steps, batches)
        return [make(feed, jnp.int32(step), key) for step, feed in found]

    return call


def _decoding_call(train: data.Split, order: Shuffled, subject: Subject) -> Call:
    steps = itertools.count()
    fields = [f for f in train.reader.fields.values() if f.kind != "label"]

    def call() -> Any:
        for step in itertools.islice(steps, subject.batches):
            records = train.records.__getitems__(order.rows(step).tolist())
            for field in fields:
                for record in records:
                    decode(record[field.feature], field.channels)

    return call


def _numpy_call(train: data.Split, order: Shuffled, subject: Subject) -> Call:
    """Gathers, pads, crops, mirrors and normalises, batch by batch."""
    arrays = {
        name: np.array(array)
        for name, array in train.arrays().items()
        if train.reader.fields[name].kind != "label"
    }
    steps = itertools.count()
    random = np.random.default_rng(0)
    height, width = train.reader.size

    def change(batch: np.ndarray, y: int, x: int, mirrored: np.ndarray) -> np.ndarray:
        pad = ((0, 0), (4, 4), (4, 4), *((0, 0),) * (batch.ndim - 3))
        batch = np.pad(batch, pad)[:, y : y + height, x : x + width]
        batch[mirrored] = batch[mirrored, :, ::-1]
        return (batch / np.float32(255) - np.float32(0.5)) * np.float32(4)

    def call() -> Any:
        for step in itertools.islice(steps, subject.batches):
            rows = order.rows(step)
            y, x = random.integers(0, 9, 2)
            mirrored = random.random(len(rows)) < 0.5
            for array in arrays.values():
                change(array[rows], y, x, mirrored)

    return call


def _tf_batches(train: data.Split, subject: Subject) -> Iterator[Any]:
    """Encoded images in memory, decoded and cropped as the guide of tf.data has it."""
    import tensorflow as tf

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
    stream = stream.batch(subject.batch_size, drop_remainder=True)
    yield from stream.prefetch(2).as_numpy_iterator()


def _step_calls(
    dataset: data.Dataset, subject: Subject, stack: contextlib.ExitStack
) -> tuple[dict[str, Call], dict[str, Call]]:
    """Training steps with a constant batch and with each way of input."""
    train = dataset.split("train")
    order = Shuffled((0, 0), len(train), subject.batch_size)
    change = subject.augment(dataset)
    batch = jax.device_put(train.read(order.rows(0)))
    ready = jax.jit(change)(jax.random.key(0), batch)
    same = subject.task(dataset, lambda key, batch: batch)
    real = subject.task(dataset, change)
    constant = (same, itertools.repeat(ready), lambda feed, step: feed)
    calls, before = {"constant batch": _step_call(*constant)}, {}
    for name, (way, feeds) in _ways(train, order, stack).items():
        calls[name] = _step_call(real, feeds, way.batch)
        if isinstance(way, GrainLoader):
            before[name] = _drain(feeds)
    calls = {name: _repeated(call, subject.steps) for name, call in calls.items()}
    return calls, before


def _step_call(task: Any, feeds: Iterator[Any], batch: Callable[..., Any]) -> Call:
    models = task.create_networks(nnx.Rngs(0))
    tx = optax.with_extra_args_support(optax.sgd(0.01, momentum=0.9))
    networks = {name: Network(split(model)[0], tx) for name, model in models.items()}
    train_step = make_train_step(task, networks)
    state = new_state(models, networks, jax.random.key(0))
    step = jax.jit(
        lambda state, feed: train_step(state, batch(feed, state.step)),
        donate_argnums=0,
    )

    def call() -> Any:
        nonlocal state
        state, scalars = step(state, next(feeds))
        return scalars

    return call


def _repeated(call: Call, times: int) -> Call:
    return lambda: [call() for _ in range(times)]


def measure(subject: Subject, rounds: int, data_dir: Path | None) -> list[Measurement]:
    """Times input alone, then steps, of one dataset."""
    dataset = data.load(subject.name, data_dir=data_dir)
    measurements = []
    for part, make, reference, number in (
        ("input alone", _loaders, "memory", subject.batches),
        ("training step", _step_calls, "constant batch", subject.steps),
    ):
        with contextlib.ExitStack() as stack:
            calls, before = make(dataset, subject, stack)
            seconds = interleave(calls, rounds, before)
        for name, times in seconds.items():
            each = statistics.median(times) / number
            measurements.append(
                Measurement(
                    dataset=subject.name,
                    part=part,
                    name=name,
                    batch_size=subject.batch_size,
                    seconds=each,
                    images_per_second=subject.batch_size / each,
                    ratio=ratio(times, seconds[reference]),
                )
            )
    return measurements


def input(
    cifar10: str = "image_folder/cifar10",
    camvid: str = "camvid",
    rounds: int = 10,
    data_dir: Path | None = None,
    run_dir: Path | None = None,
) -> None:
    """Time each way of images to the training step, and what it costs the step.

    Args:
      cifar10: name of a prepared dataset of small images, to classify.
      camvid: name of a prepared dataset of larger ones, to segment.
      rounds: how often each is timed.
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR if unset.
      run_dir: folder for the results; a new one under runs/ if unset.
    """
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}")
    console = make_console()
    config = {"cifar10": cifar10, "camvid": camvid, "rounds": rounds}
    subjects = _subjects(cifar10, camvid)
    for subject in subjects:  # what is missing is said before anything is timed
        data.open_prepared(subject.name, data_dir=data_dir)
    with open_run_folder(run_dir, "input", config, resume=False) as folder:
        folder.start()
        measurements = []
        with shown_on(console)("timing", len(subjects)) as reporter:
            for subject in subjects:
                measurements += measure(subject, rounds, data_dir)
                reporter.advance()
        _write(folder.path / "rows.csv", measurements)
        for name in dict.fromkeys((m.dataset, m.part) for m in measurements):
            found = [m for m in measurements if (m.dataset, m.part) == name]
            console.print(_table(": ".join(name), found), soft_wrap=False)
        console.print(f"Written to {folder.path}")


def _table(title: str, measurements: list[Measurement]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("way", "images/s", "ms/batch", "time to first [10 %, 90 %]"):
        table.add_column(name, no_wrap=True)
    for m in measurements:
        spread = f"{m.ratio.median:.2f} [{m.ratio.low:.2f}, {m.ratio.high:.2f}]"
        row = (f"{m.images_per_second:,.0f}", f"{1000 * m.seconds:.1f}", spread)
        table.add_row(m.name, *row)
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write(path: Path, measurements: list[Measurement]) -> None:
    where = environment() | {name: _version(name) for name in _PACKAGES}
    rows = [dataclasses.asdict(m) | where for m in measurements]
    for row in rows:
        row |= {f"ratio_{k}": v for k, v in row.pop("ratio")._asdict().items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
