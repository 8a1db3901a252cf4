"""Loads runs to predict, to export weights and to compare them.

A run folder holds everything that is needed, except that a comparison also reads
examples from the dataset.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

import models
from optax_tricks.nnx import split
from train.config import TrainingConfig
from train.data.dataset import Dataset, from_description
from train.data.images import IMAGE_SUFFIXES, BadFileError, check_photo, decode
from train.errors import UsageError
from train.output.checkpoints import Checkpoints
from train.output.run_folder import CONFIG
from train.run import DATASET, checkpoint_folder
from train.settings import from_json
from train.step import TrainState, Tree, eval_networks, eval_params
from train.tasks import TASKS
from train.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The networks of a run, from its last checkpoint.

    Attributes:
      folder: the run folder.
      config: the settings of the run.
      dataset: the description of its dataset, without examples.
      task: its task.
      graphdefs: the graph definition of each network.
      params: the (params, model_state) to evaluate; both are dicts by network.
    """

    folder: Path
    config: TrainingConfig
    dataset: Dataset
    task: Task
    graphdefs: dict[str, nnx.GraphDef[models.Network]]
    params: tuple[Tree, Tree]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the predictions of the task.

        Args:
          images: stored images, uint8 (batch, height, width, channels).
        """
        return np.asarray(self._predict(self.params, images))

    @functools.cached_property
    def _predict(self) -> Callable[[tuple[Tree, Tree], np.ndarray], jax.Array]:
        """The jitted function, kept so that further images do not compile it again."""

        @jax.jit
        def predict(params: tuple[Tree, Tree], images: jax.Array) -> jax.Array:
            networks = eval_networks(self.graphdefs, *params)
            return self.task.predict(networks, images)

        return predict


def load_run(folder: Path, seed: int | None, console: Console) -> LoadedRun:
    """Loads the networks of a run, whether it has finished or not.

    Args:
      folder: the run folder.
      seed: the seed whose networks are loaded; the first one of the run if unset.
      console: shows which checkpoints are damaged and skipped.

    Raises:
      UsageError: if the folder does not hold a run, or the run does not have this seed
        or a checkpoint that can be read.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())["config"]
        task_type = TASKS[content.pop("task")]
        config = from_json(task_type.config_type, content)
        dataset = from_description(json.loads((folder / DATASET).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} is not the folder of a training run ({error!r}): give one that "
            "`python -m train` has written"
        ) from error
    seed = config.seed if seed is None else seed
    if seed not in config.all_seeds:
        seeds = ", ".join(map(str, config.all_seeds))
        raise UsageError(f"{folder} has the seeds {seeds}, not {seed}")
    task = task_type.create(config, dataset)
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    parts = {name: split(network) for name, network in networks.items()}
    graphdefs = {name: graphdef for name, (graphdef, _, _) in parts.items()}
    like = tuple({name: part[i] for name, part in parts.items()} for i in (1, 2))
    params = _restore(folder, config, like, seed, console)
    return LoadedRun(folder, config, dataset, task, graphdefs, params)


def _restore(
    folder: Path, config: TrainingConfig, like: Tree, seed: int, console: Console
) -> tuple[Tree, Tree]:
    """Reads the (params, model_state) to evaluate from the last checkpoint."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_device(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

    params, model_state = jax.tree.map(on_device, like)
    nothing: Any = TrainState(*[None] * len(TrainState._fields))  # type: ignore[arg-type]
    if config.ema:
        state = nothing._replace(ema=(params, model_state))
    else:
        state = nothing._replace(params=params, model_state=model_state)
    with Checkpoints(checkpoint_folder(folder, seed)) as checkpoints:
        found = checkpoints.restore((state, None), warn=console.print, partial=True)
    if found is None:
        raise UsageError(f"{folder} has no checkpoint yet: train for longer")
    _, (state, _) = found
    return eval_params(state)


def export(run: LoadedRun, output: Path | None, console: Console) -> list[Path]:
    """Saves the weights of each network as safetensors.

    Args:
      run: the loaded run.
      output: the file to write; weights.safetensors in the run folder if unset. If
        there are several networks, each has its own file with its name in the name.
      console: shows the path of each file.

    Returns:
      The paths of the files.
    """
    output = output or run.folder / "weights.safetensors"
    params, model_state = run.params
    paths = []
    for name, graphdef in run.graphdefs.items():
        several = len(run.graphdefs) > 1
        path = output.with_stem(f"{output.stem}-{name}") if several else output
        model = nnx.merge(graphdef, params[name], model_state[name])
        models.save_weights(model, path)
        console.print(f"written: {path}")
        paths.append(path)
    return paths


def predict(
    run: LoadedRun, images: Sequence[Path], output: Path | None, console: Console
) -> None:
    """Classifies, segments or translates image files.

    Images are scaled to the size that the network was trained on, and predicted masks
    and images back to the size of the file.

    Args:
      run: the loaded run.
      images: files, or folders of them.
      output: folder for pictures and tables; predictions in the run folder if unset.
      console: shows the prediction for each file.

    Raises:
      UsageError: if there are no images, if two have the same name, or if one cannot be
        read.
    """
    files = _image_files(images)
    output = output or run.folder / "predictions"
    output.mkdir(parents=True, exist_ok=True)
    reader = run.dataset.split("train").reader
    if reader.fit == "pad":  # padding would be predicted too
        reader = dataclasses.replace(reader, fit="stretch")
    elif reader.fit == "stretch":  # a crop would leave out a part of the image
        size = run.config.data.training_size(run.dataset)
        reader = dataclasses.replace(reader, size=size)
    field = reader.fields[run.task.input_name]
    photos = [_read(file, field.channels) for file in files]
    fitted = [reader.fitted(photo, field.kind) for photo in photos]
    predictions = [run.predict(image[None])[0] for image in fitted]
    names = [file.stem for file in files]
    lines = run.task.save_predictions(output, names, photos, predictions)
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
            f"several images are called {twice[0]}: predict them one by one, each into "
            "another output folder"
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


def compare(
    runs: Sequence[LoadedRun], labels: Sequence[str], count: int, output: Path
) -> None:
    """Draws what several runs predict for the same examples, side by side.

    Args:
      runs: runs of one task on one dataset.
      labels: a label for each run.
      count: number of examples of the evaluation split.
      output: the PNG file to write.

    Raises:
      UsageError: if the runs differ in task or dataset.
    """
    first = runs[0]
    if {(run.config.task, run.dataset.name) for run in runs} != {
        (first.config.task, first.dataset.name)
    }:
        raise UsageError("runs can be compared only for the same task and dataset")
    config = first.config.data
    split = config.load(first.config.task).split(config.eval_split)
    batch = split.read(range(min(count, len(split))))
    stored = batch[first.task.input_name]
    predictions = {
        label: run.predict(stored) for label, run in zip(labels, runs, strict=True)
    }
    first.task.save_comparison(output, batch, predictions)
