"""What becomes of a run: weights for others, predictions, runs side by side.

A run's folder tells all, but for the examples of its dataset.
"""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

import models
from optax_tricks.nnx import split
from train.checkpoints import Checkpoints
from train.config import TrainingConfig, from_json
from train.data._dataset import Dataset, from_description
from train.data._images import IMAGE_SUFFIXES, BadFileError, check_photo, decode
from train.errors import UsageError
from train.figures import save_comparison
from train.run import CHECKPOINTS, DATASET, layout_of
from train.run_folder import CONFIG
from train.step import Task, TrainState, Tree, evaluation_models
from train.tasks import TASKS


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """The networks of a run as its last checkpoint has them.

    Attributes:
      folder: of the run.
      name: of the task.
      config: of the run.
      dataset: what is known of its data; without examples.
      task: what it trained.
      graphdefs: of the networks, by name.
      networks: their parameters and other state, by name.
    """

    folder: Path
    name: str
    config: TrainingConfig
    dataset: Dataset
    task: Task
    graphdefs: dict[str, nnx.GraphDef]
    networks: tuple[Tree, Tree]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """What the task predicts for stored images, uint8 (batch, ...)."""

        @jax.jit
        def predict(networks: Tree, images: jax.Array) -> jax.Array:
            found = evaluation_models(self.graphdefs, *networks)
            return self.task.predict(found, images)

        return np.asarray(predict(self.networks, images))


def open_trained(folder: Path, seed: int | None, console: Console) -> Trained:
    """Reads the networks of a run, finished or not.

    Args:
      folder: of the run.
      seed: whose networks; the first of the run's if unset.
      console: where damaged checkpoints are named.

    Raises:
      UsageError: if the folder is not that of a run with a checkpoint, or it has no
        such seed.
    """
    try:
        described = json.loads((folder / CONFIG).read_text())["config"]
        module, kind = TASKS[described.pop("task")]
        config = from_json(kind, described)
        dataset = from_description(json.loads((folder / DATASET).read_text()))
    except (OSError, UsageError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} is not the folder of a training run ({error!r}): give one that "
            "`python -m train` has written"
        ) from error
    seeds = range(config.seed, config.seed + config.seeds)
    seed = config.seed if seed is None else seed
    if seed not in seeds:
        raise UsageError(
            f"{folder} has the seeds {', '.join(map(str, seeds))}, not {seed}"
        )
    task = module.make_task(config, dataset)
    found = nnx.eval_shape(lambda: task.create_models(nnx.Rngs(0)))
    parts = {name: split(model) for name, model in found.items()}
    networks = _restore(folder, config, parts, seed - config.seed, console)
    graphdefs = {name: graphdef for name, (graphdef, _, _) in parts.items()}
    return Trained(folder, module.NAME, config, dataset, task, graphdefs, networks)


def _restore(
    folder: Path,
    config: TrainingConfig,
    parts: dict[str, tuple[nnx.GraphDef, Tree, Tree]],
    place: int,
    console: Console,
) -> tuple[Tree, Tree]:
    """Parameters and other state of the networks of one seed."""
    width = layout_of(config).width

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        shape = (width, *x.shape) if width > 1 else x.shape
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=device)

    networks = tuple({name: part[i] for name, part in parts.items()} for i in (1, 2))
    params, model_state = jax.tree.map(stacked, networks)
    state = TrainState(params, model_state, None, (), None, None, None)
    if config.ema:
        state = TrainState(None, None, None, (params, model_state), None, None, None)
    groups = config.seeds // width
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        found = checkpoints.restore((state,) * groups, warn=console.print, partial=True)
    if found is None:
        raise UsageError(f"{folder} has no checkpoint yet: train for longer")
    state = found[1][place // width]
    networks = state.average or (state.params, state.model_state)
    if width == 1:
        return networks
    return jax.tree.map(lambda x: x[place % width], networks)


def export(trained: Trained, output: Path | None, console: Console) -> list[Path]:
    """Writes the weights of each network to a safetensors file.

    Args:
      trained: the networks.
      output: the file, or with several networks their common stem; those of the run
        folder if unset.
      console: where to say what was written.

    Returns:
      The files.
    """
    output = output or trained.folder / "weights.safetensors"
    params, model_state = trained.networks
    paths = []
    for name, graphdef in trained.graphdefs.items():
        several = len(trained.graphdefs) > 1
        path = output.with_stem(f"{output.stem}-{name}") if several else output
        model = nnx.merge(graphdef, params[name], model_state[name])
        models.save_weights(model, path)
        console.print(f"written: {path}")
        paths.append(path)
    return paths


def predict(
    trained: Trained, images: Sequence[Path], output: Path | None, console: Console
) -> None:
    """Classifies, segments or translates image files.

    Images are brought to the size that the network was trained on; what it makes of
    them has the size of the file again.

    Args:
      trained: the networks.
      images: files, or folders of them.
      output: folder for pictures and tables; one in the run folder if unset.
      console: where to say what was found.

    Raises:
      UsageError: if there are no images, or one cannot be read.
    """
    files = _image_files(images)
    output = output or trained.folder / "predictions"
    output.mkdir(parents=True, exist_ok=True)
    reader = trained.dataset.split("train").reader
    if reader.fit == "pad":  # a border would be predicted too
        reader = dataclasses.replace(reader, fit="stretch")
    elif reader.fit == "stretch":  # nothing is to be cut off
        size = trained.config.data.training_size(trained.dataset)
        reader = dataclasses.replace(reader, size=size)
    field = next(iter(reader.fields.values()))  # the image, or the input of a pair
    photos = [_read(file, field.channels) for file in files]
    fitted = [reader.fitted(photo, field.kind) for photo in photos]
    predictions = [trained.predict(image[None])[0] for image in fitted]
    names = [file.stem for file in files]
    lines = trained.task.save_predictions(output, names, photos, predictions)
    for file, line in zip(files, lines, strict=True):
        console.print(f"{file}: {line}")
    console.print(f"written to {output}")


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [f for f in inside if f.suffix.lower() in IMAGE_SUFFIXES]
    counts = collections.Counter(file.stem for file in files)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UsageError(
            f"several images are called {twice[0]}: predict them one by one, each with "
            "its own --output"
        )
    if not files:
        raise UsageError(
            f"there is no image ({', '.join(IMAGE_SUFFIXES)}) among "
            f"{', '.join(map(str, paths))}"
        )
    return files


def _read(file: Path, channels: int) -> np.ndarray:
    try:
        photo = check_photo(file.read_bytes(), str(file), channels)
    except BadFileError as error:
        raise UsageError(str(error)) from error
    return decode(photo.data, channels)


def samples(
    runs: Sequence[Trained], labels: Sequence[str], count: int, output: Path
) -> None:
    """Lays what several runs make of the same examples side by side.

    Args:
      runs: of one task on one dataset, segmentation or translation.
      labels: what to call each of them.
      count: how many examples of the evaluation split to show.
      output: the PNG file to write.

    Raises:
      UsageError: if the runs have different tasks or data, or nothing to show.
    """
    first = runs[0]
    if any(
        (run.name, run.dataset.name) != (first.name, first.dataset.name) for run in runs
    ):
        raise UsageError("runs that are laid side by side need one task and dataset")
    if not hasattr(first.task, "columns"):
        raise UsageError(f"{first.name} has no pictures to lay side by side")
    config = first.config.data
    split = config.load(first.name).split(config.evaluate_on)
    batch = split.read(range(min(count, len(split))))
    stored = next(iter(batch.values()))  # the image, or the input of a pair
    outputs = [run.predict(stored) for run in runs]
    columns, legend = first.task.columns(batch, dict(zip(labels, outputs, strict=True)))
    save_comparison(output, columns, legend)
