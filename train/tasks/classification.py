"""Classification: one label per image, cross-entropy, accuracy."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import models
from train import figures
from train.config import TrainingConfig
from train.data import Dataset, augment
from train.data.augment import Augmentation
from train.errors import UsageError
from train.metrics import confusion_matrix
from train.optimizers import OptimizerConfig
from train.progress import Progress, silent
from train.step import Metrics, Models
from train.tasks._checks import check_images
from train.tasks._words import in_words

NAME = "classification"
METRIC = "accuracy"

ModelName = tyro.extras.literal_type_from_choices(models.names(task=NAME))

_TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig(TrainingConfig):
    """Train a network to tell the classes of images."""

    model: ModelName = "resnet8"
    """Network to train."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""
    weights: Path | None = None
    """Safetensors to fine-tune from; for other classes the last layer starts anew."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        models.describe(self.model)
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(
                f"label_smoothing must be from 0 to below 1, got {self.label_smoothing}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """The task, for images of one form.

    Attributes:
      config: how to train.
      class_names: names of the classes to tell.
      image_shape: (height, width, channels) of the images that the network sees.
      augment: random changes of training images, and their normalisation.
      normalize: what brings other images to this form.
    """

    config: ClassificationConfig
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    augment: Augmentation
    normalize: Augmentation

    def create_models(self, rngs: nnx.Rngs) -> Models:
        """A network for these images and classes, called "model"."""
        height, width, channels = self.image_shape
        name = self.config.model
        options = {"num_classes": len(self.class_names), "in_channels": channels}
        if "image_size" in models.describe(name).options:
            # What is not square gets a clear refusal from the network's own check.
            options["image_size"] = min(height, width)
        dtype = self.config.dtype
        return {"model": models.create(name, rngs=rngs, dtype=dtype, **options)}

    def load(self, networks: Models) -> None:
        """Reads the weights to fine-tune from; a head for other classes stays as it is.

        Raises:
          UsageError: if the file is missing or is not of this network.
        """
        path = self.config.weights
        if path is None:
            return
        for new_head in (False, True):
            try:
                models.load_weights(networks["model"], path, new_head=new_head)
            except (OSError, ValueError) as error:
                problem = error
            else:
                return
        raise UsageError(f"--weights: {problem}") from problem

    def optimizer_for(self, name: str) -> OptimizerConfig:
        """By what the network is trained."""
        del name
        return self.config.optimizer

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        """Augments and normalises images."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Models, batch: Any
    ) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy, and accuracy, of a prepared batch."""
        logits, labels = networks[name](batch["image"]), batch["label"]
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), self.config.label_smoothing
        )
        losses = optax.softmax_cross_entropy(logits, targets)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return losses.mean(), {"accuracy": (correct.sum(), jnp.float32(labels.size))}

    def evaluate(self, networks: Models, batch: Any) -> dict[str, jax.Array]:
        """Sums of the loss, without smoothing, and who was taken for whom."""
        weight, labels = batch["weight"], batch["label"]
        logits = self._logits(networks, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        predicted = logits.argmax(axis=-1)
        totals = {
            "loss": (losses * weight).sum(),
            "confusion": confusion_matrix(
                labels, predicted, weight > 0, len(self.class_names)
            ),
        }
        if len(self.class_names) > _TOP:
            _, best = jax.lax.top_k(logits, _TOP)
            found = (best == labels[:, None]).any(axis=-1)
            totals["top5"] = (found * weight).sum()
        return totals

    def scores(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        """Loss, accuracy and, of more than five classes, top-5 accuracy."""
        confusion = totals["confusion"]
        count = confusion.sum()
        scores = {
            "loss": totals["loss"] / count,
            "accuracy": np.trace(confusion) / count,
        }
        if "top5" in totals:
            scores["top5"] = totals["top5"] / count
        return {name: float(score) for name, score in scores.items()}

    def predict(self, networks: Models, images: jax.Array) -> jax.Array:
        """Probabilities of the classes, float32 (batch, classes), of stored images."""
        return jax.nn.softmax(self._logits(networks, images))

    def save_figures(
        self,
        folder: Path,
        totals: dict[str, np.ndarray],
        batch: dict[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `confusion_matrix.png`."""
        del batch, predictions
        figures.save_confusion_matrix(
            totals["confusion"], self.class_names, folder / "confusion_matrix.png"
        )

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[str]:
        """Writes `predictions.csv`, and `predictions.png` of the photos.

        Returns:
          The likeliest classes of each photo, in words.
        """
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "class", *self.class_names])
            for name, shares in zip(names, predictions, strict=True):
                best = self.class_names[shares.argmax()]
                writer.writerow([name, best, *(f"{share:.6f}" for share in shares)])
        titles = [in_words(shares, self.class_names, 1) for shares in predictions]
        figures.save_titled(folder / "predictions.png", photos, titles)
        return [in_words(shares, self.class_names) for shares in predictions]

    def _logits(self, networks: Models, images: jax.Array) -> jax.Array:
        batch = self.normalize(jax.random.key(0), {"image": images})
        return networks["model"](batch["image"])


def make_task(config: ClassificationConfig, dataset: Dataset) -> Classification:
    """The task that a config describes, for such data.

    Raises:
      UsageError: if they do not fit each other.
    """
    normalize = augment.normalize(dataset.mean, dataset.std)
    size = config.data.training_size(dataset)
    return Classification(
        config=config,
        class_names=dataset.class_names,
        image_shape=(*size, len(dataset.mean)),
        augment=config.data.augmentation(dataset, normalize),
        normalize=augment.chain(augment.center_crop(size), normalize),
    )


def open_task(
    config: ClassificationConfig, progress: Progress = silent
) -> tuple[Classification, Dataset]:
    """Loads the data and makes the task that a config describes.

    Raises:
      UsageError: if they do not fit each other.
    """
    dataset = config.data.load(NAME, progress)
    if dataset.num_classes < 2:
        raise UsageError(f"{dataset.name} has one class only: there is nothing to tell")
    task = make_task(config, dataset)
    check_images(task, dataset)
    return task, dataset
