"""Loads runs to predict, to export weights and to compare them.

A run folder holds everything that is needed, except that a comparison also reads
examples from the dataset.
"""

import collections
import csv
import dataclasses
import functools
import tempfile
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
from train.files import sync
from train.output.checkpoints import Checkpoint, find_checkpoint
from train.output.run_folder import CONFIG, read_summary
from train.run import checkpoint_folder, checkpoint_seeds
from train.settings import from_json
from train.step import TrainState, Tree, eval_networks, eval_params
from train.tasks import TASKS
from train.tasks.base import Prediction, Task

TABLE = "predictions.csv"


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
    found = _find_checkpoint(folder, seed, console)
    try:
        content = dict(found.about["config"])
        task_type = TASKS[content.pop("task")]
        config = from_json(task_type.config_type, content)
        dataset = from_description(found.about["dataset"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{found.folder} was written by another version of this program ({error}): "
            "train again"
        ) from error
    task = task_type.create(config, dataset)
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    parts = {name: split(network) for name, network in networks.items()}
    graphdefs = {name: graphdef for name, (graphdef, _, _) in parts.items()}
    like = tuple({name: part[i] for name, part in parts.items()} for i in (1, 2))
    params = _read_params(found, config, like)
    return LoadedRun(folder, config, dataset, task, graphdefs, params)


def _find_checkpoint(folder: Path, seed: int | None, console: Console) -> Checkpoint:
    """Returns the last checkpoint of a seed; of the first one if unset."""
    seeds = checkpoint_seeds(folder)
    if seed is not None and seeds and seed not in seeds:
        known = ", ".join(map(str, seeds))
        raise UsageError(f"{folder} has the seeds {known}, not {seed}")
    for one in seeds if seed is None else [seed]:
        found = find_checkpoint(
            checkpoint_folder(folder, one), warn=console.print, identity={"seed": one}
        )
        if found is not None:
            _warn_of_others(folder, one, seed, found, console)
            return found
    if (folder / CONFIG).exists():
        raise UsageError(f"{folder} has no checkpoint yet: train for longer")
    raise UsageError(
        f"{folder} is not the folder of a training run: give one that "
        "`python -m train` has written"
    )


def _warn_of_others(
    folder: Path, seed: int, wanted: int | None, found: Checkpoint, console: Console
) -> None:
    """Warns if a later checkpoint, or that of the first seed, should be there."""
    first = found.about["config"].get("seed", seed)
    if wanted is None and seed != first:
        console.print(
            f"warning: seed {first} of {folder} has no checkpoint any more: taking "
            f"seed {seed}"
        )
    last = read_summary(folder).get("step", found.step)
    if found.step != last:
        console.print(
            f"warning: {folder} was trained for {last:.0f} steps, but its last "
            f"checkpoint is of step {found.step}: taking that"
        )


def _read_params(
    checkpoint: Checkpoint, config: TrainingConfig, like: Tree
) -> tuple[Tree, Tree]:
    """Reads the (params, model_state) to evaluate."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_device(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

    params, model_state = jax.tree.map(on_device, like)
    nothing: Any = TrainState(*[None] * len(TrainState._fields))  # type: ignore[arg-type]
    if config.ema:
        state = nothing._replace(ema=(params, model_state))
    else:
        state = nothing._replace(params=params, model_state=model_state)
    return eval_params(checkpoint.read(state, partial=True))


def export(run: LoadedRun, output: Path | None, console: Console) -> list[Path]:
    """Saves the weights of each network as safetensors.

    Args:
      run: the loaded run.
      output: the file to write, or a folder for weights.safetensors; the run folder if
        unset. If there are several networks, each has its own file with its name in the
        name.
      console: shows the path of each file.

    Returns:
      The paths of the files.
    """
    output = output or run.folder
    if output.is_dir():
        output /= "weights.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
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
    and images back to the size of the file. Results appear when all are complete.

    Args:
      run: the loaded run.
      images: files, or folders of them. Hidden files and those of other kinds in a
        folder are skipped.
      output: folder for pictures and `predictions.csv`, which names each file with its
        path as it was given; predictions in the run folder if unset.
      console: shows the prediction for each file.

    Raises:
      UsageError: if one of the paths is missing, is not an image or has none. The
        message names all of them, and nothing is predicted.
    """
    reader = run.dataset.split("train").reader
    if reader.fit == "pad":  # padding would be predicted too
        reader = dataclasses.replace(reader, fit="stretch")
    elif reader.fit == "stretch":  # a crop would leave out a part of the image
        size = run.config.data.training_size(run.dataset)
        reader = dataclasses.replace(reader, size=size)
    field = reader.fields[run.task.input_name]
    photos = _read_all(images, field.channels, console)
    fitted = [reader.fitted(photo, field.kind) for photo in photos.values()]
    predictions = [run.predict(image[None])[0] for image in fitted]
    output = output or run.folder / "predictions"
    output.mkdir(parents=True, exist_ok=True)
    names = _unique_names(list(photos))
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as partial:
        results = run.task.save_predictions(
            Path(partial), names, list(photos.values()), predictions
        )
        _save_table(Path(partial) / TABLE, list(photos), results)
        for made in sorted(Path(partial).iterdir()):
            sync(made)
            made.replace(output / made.name)
        sync(output)
    for (file, photo), result in zip(photos.items(), results, strict=True):
        console.print(f"{file}: {result.line}")
        if field.half and _is_pair(photo, reader.size):
            side = "left" if field.half == "a" else "right"
            console.print(
                f"{file}: warning: this seems to be a side-by-side pair, and was "
                f"translated as a whole: cut out its {side} half"
            )
    console.print(f"written to {output}")


def _save_table(
    path: Path, files: Sequence[Path], predictions: Sequence[Prediction]
) -> None:
    """Saves what is predicted for each file, which is named as the user gave it."""
    # A name that is not UTF-8 stays as it is.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(["image", *(title for title, _ in predictions[0].cells)])
        for file, prediction in zip(files, predictions, strict=True):
            table.writerow([file, *(text for _, text in prediction.cells)])


def _is_pair(photo: np.ndarray, size: tuple[int, int]) -> bool:
    """Returns whether a picture is about twice as wide as the images of a size."""
    stretch = (photo.shape[1] / photo.shape[0]) / (size[1] / size[0])
    return 1.9 < stretch < 2.1


def _read_all(
    paths: Sequence[Path], channels: int, console: Console
) -> dict[Path, np.ndarray]:
    """Reads all images that are named, or are in a folder that is named.

    Returns:
      The images by file, uint8 (height, width, channels).

    Raises:
      UsageError: if a path is missing or damaged, is not an image or has none.
    """
    photos: dict[Path, np.ndarray] = {}
    problems = []
    for path in paths:
        try:
            for file in _image_files(path, console):
                if file not in photos:
                    photos[file] = _read(file, channels)
        except (UsageError, OSError) as error:
            problems.append(_in_words(error))
    if len(problems) == 1 == len(paths):
        raise UsageError(problems[0])
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UsageError(f"nothing was predicted, as some paths have no image:{listed}")
    return photos


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _image_files(path: Path, console: Console) -> list[Path]:
    """Returns a file, or the images in a folder.

    Raises:
      UsageError: if there is no such path, or it is no image and has none.
    """
    kinds = ", ".join(IMAGE_SUFFIXES)
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UsageError(f"{path}: not a file of a known kind; known: {kinds}")
        return [path]
    inside = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    files = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file.name for file in inside if file not in files]
    if not files:
        has_folders = any(file.is_dir() for file in inside)
        remedy = "; name the folders in it" if has_folders else ""
        raise UsageError(f"{path}: there is no image ({kinds}) in this folder{remedy}")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        console.print(f"{path}: skipped {', '.join(others[:3])}{more}: no image")
    return files


def _read(file: Path, channels: int) -> np.ndarray:
    try:
        photo = check_photo(file.read_bytes(), str(file), channels)
    except BadFileError as error:
        raise UsageError(str(error)) from error
    return decode(photo.data, channels)


def _unique_names(files: Sequence[Path]) -> list[str]:
    """Returns a name for the results of each file: its stem, where that is unique.

    Else the suffix or the folders tell files apart.

    >>> _unique_names([Path("a/x.png"), Path("b/x.png"), Path("y.png"), Path("y.jpg")])
    ['a-x', 'b-x', 'y-png', 'y-jpg']

    Raises:
      UsageError: if no such name is unique.
    """
    # Where case is ignored, results would replace each other.
    same_stem = collections.Counter(
        (file.absolute().parent, file.stem.lower()) for file in files
    )
    parts = [
        (
            *file.absolute().parts[1:-1],
            file.stem
            if same_stem[file.absolute().parent, file.stem.lower()] == 1
            else file.name.replace(".", "-"),
        )
        for file in files
    ]
    lengths = [1] * len(files)
    while True:
        names = ["-".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        counts = collections.Counter(name.lower() for name in names)
        shared = [i for i, name in enumerate(names) if counts[name.lower()] > 1]
        if not shared:
            return names
        if all(lengths[i] == len(parts[i]) for i in shared):
            raise UsageError(
                f"{files[shared[0]]} and {files[shared[1]]} would have results of the "
                "same name: predict them one by one, each into another output folder"
            )
        for i in shared:
            lengths[i] = min(lengths[i] + 1, len(parts[i]))


def compare(
    runs: Sequence[LoadedRun], labels: Sequence[str], count: int, output: Path | None
) -> Path:
    """Draws what several runs predict for the same examples, side by side.

    Args:
      runs: runs of one task on one dataset, at one image size.
      labels: a label for each run.
      count: number of examples of the evaluation split.
      output: the PNG file to write, or a folder for comparison.png; the folder that
        holds the first run if unset.

    Returns:
      The path of the file.

    Raises:
      UsageError: if the runs differ in task, dataset or image size, or if labels are
        not unique.
    """
    first = runs[0]

    def kind(run: LoadedRun) -> tuple[Any, ...]:
        reader = run.dataset.split("train").reader
        return run.config.task, run.dataset.name, reader.size, reader.fields

    if any(kind(run) != kind(first) for run in runs):
        raise UsageError(
            "runs can be compared only for the same task and dataset, with the same "
            "image_size and direction"
        )
    if len(set(labels)) < len(labels):
        raise UsageError(
            f"runs need different labels, got {', '.join(labels)}: name them with "
            "labels"
        )
    output = output or first.folder.absolute().parent
    if output.is_dir():
        output /= "comparison.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    config = first.config.data
    split = config.load(first.config.task).split(config.eval_split)
    batch = split.read(range(min(count, len(split))))
    stored = batch[first.task.input_name]
    predictions = {
        label: run.predict(stored) for label, run in zip(labels, runs, strict=True)
    }
    first.task.save_comparison(output, batch, predictions)
    return output
