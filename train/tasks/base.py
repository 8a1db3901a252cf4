"""The interface between the training loop and a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Num

import models
from train.config import TrainingConfig
from train.data import Dataset
from train.errors import UsageError, see
from train.optim.config import OptimizerConfig

Batch: TypeAlias = dict[str, Num[Array, "batch ..."]]
Networks: TypeAlias = dict[str, models.Network]
SumAndCount: TypeAlias = tuple[Float[Array, ""], Float[Array, ""]]
"""A mean over the items of a batch, whose parts are added up before the division."""
Metrics: TypeAlias = dict[str, SumAndCount]
"""Metrics of a batch by name."""
Sums: TypeAlias = dict[str, Any]
"""Arrays by name, which are added up over the batches of an evaluation.

The loop adds them up on the host, in int64 and float64.
"""


class Prediction(NamedTuple):
    """What is predicted for an image file, in words.

    Attributes:
      line: the text to show.
      cells: pairs of a title and the text below it, for the table of all files. Titles
        are the same for all files.
    """

    line: str
    cells: Sequence[tuple[str, str]]


class Task(Protocol):
    """The interface of a task, such as classification, for the images of one dataset.

    Batches are dicts of arrays whose first axis counts examples: "image" and "label",
    "image" and "mask", or "input" and "target", as `train.data` stores them.

    Attributes:
      name: the name of the task, which is also `config_type.task`.
      metric: the name of the score that a run reports.
      input_name: the name of the array in a batch that is the input of the network.
      config_type: the class of its settings.
      config: the settings of the run.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    input_name: ClassVar[str]
    config_type: ClassVar[type[TrainingConfig]]

    @property
    def config(self) -> TrainingConfig:
        """The settings of the run."""

    @classmethod
    def create(cls, config: Any, dataset: Dataset) -> "Task":
        """Makes the task of a config for a dataset, without reading examples.

        Raises:
          UsageError: if the config does not fit the dataset.
        """

    def create_networks(self, rngs: nnx.Rngs) -> Networks:
        """Makes networks with fresh parameters, in the order in which they train."""

    def load_weights(self, networks: Networks) -> str:
        """Loads the pretrained weights that the config names into new networks.

        Returns:
          A line that says which layers are pretrained; "" if the config names none.

        Raises:
          UsageError: if a file is missing or is for another network.
        """

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Returns the optimizer settings of the network `name`."""

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Augments and normalizes stored examples; runs inside the training step."""

    def loss(
        self, name: str, networks: Networks, batch: Batch
    ) -> tuple[SumAndCount, Metrics]:
        """Returns the loss that the network `name` minimizes, and metrics.

        The loss is a (sum, count), so that a batch that is evaluated in parts has the
        same mean loss as a whole one.

        Args:
          name: the network that is trained.
          networks: all networks, in training mode.
          batch: prepared examples.
        """

    def evaluate(
        self, networks: Networks, batch: Batch, weights: Float[Array, " batch"]
    ) -> Sums:
        """Returns sums over a batch, which are added up over all batches.

        Args:
          networks: all networks, in evaluation mode.
          batch: stored examples.
          weights: 1 for each example, and 0 for entries that only fill the last batch.
        """

    def scores(self, sums: Sums) -> dict[str, float]:
        """Returns the scores by name, from the NumPy sums over all examples."""

    def predict(
        self, networks: Networks, images: Num[Array, "batch height width channels"]
    ) -> Num[Array, "batch ..."]:
        """Returns predictions for stored images."""

    def save_figures(
        self,
        folder: Path,
        sums: Sums,
        batch: Mapping[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws the figures of a finished run.

        Args:
          folder: where to save PNG files.
          sums: the sums over the evaluation split.
          batch: some stored examples of the evaluation split.
          predictions: the predictions for these examples.
        """

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[Prediction]:
        """Saves the pictures of predictions for image files.

        Args:
          folder: where to save them.
          names: a name for the pictures of each file, without suffix.
          photos: the images as the files hold them, uint8 (height, width, channels).
          predictions: the prediction for each image, as `predict` returns it.

        Returns:
          What is predicted for each file.
        """

    def save_comparison(
        self,
        path: Path,
        batch: Mapping[str, np.ndarray],
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Draws what several runs predict for the same stored examples.

        Args:
          path: the PNG file to write.
          batch: the examples.
          predictions: the predictions of each run, by the label of the run.
        """


def check_images(task: Task, dataset: Dataset) -> None:
    """Checks that the networks of a task take the images of a dataset.

    This traces the losses of one training example, and computes nothing.

    Raises:
      UsageError: if a network cannot take images of this shape.
    """
    reader = task.config.data.training_split(dataset).reader
    batch = {
        name: jax.ShapeDtypeStruct((1, *shape), dtype)
        for name, (shape, dtype) in reader.spec.items()
    }

    def losses(batch: Batch) -> list[SumAndCount]:
        networks = task.create_networks(nnx.Rngs(0))
        batch = task.prepare(batch, jax.random.key(0))
        return [task.loss(name, networks, batch)[0] for name in networks]

    try:
        jax.eval_shape(losses, batch)
    except models.ImageShapeError as error:
        raise UsageError(
            f"the network cannot take these images: {error} (image_size scales all "
            "images, and crop cuts out a part of each training image)"
            + see("data.md#sizes-and-augmentation")
        ) from error


def shares_in_words(
    shares: np.ndarray, class_names: Sequence[str], most: int = 5
) -> str:
    """Lists the classes with the largest shares in percent, down to half a percent.

    >>> from train.tasks.base import shares_in_words
    >>> shares_in_words(np.array([0.0, 0.9, 0.1]), ["cat", "dog", "cow"])
    'dog 90 %, cow 10 %'

    Args:
      shares: the share of each class, from 0 to 1, of shape (classes,).
      class_names: names of the classes.
      most: largest number of classes to list.
    """
    largest = np.argsort(-shares, kind="stable")[:most]
    return ", ".join(
        f"{class_names[i]} {100 * shares[i]:.0f} %"
        for i in largest
        if shares[i] > 0.005
    )
