"""Classification: one label per image, cross-entropy, accuracy."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

import models
from train import plots
from train.config import TrainingConfig
from train.data import Dataset, augment
from train.data.augment import Augmentation
from train.errors import UsageError
from train.metrics import confusion_matrix
from train.optim.config import OptimizerConfig
from train.settings import AnyPath, Choice, Fraction, settings
from train.tasks.base import (
    Batch,
    Metrics,
    Networks,
    Prediction,
    SumAndCount,
    Sums,
    shares_in_words,
)
from train.tasks.fine_tuning import FineTuningConfig, freeze, make_normalize

_TOP = 5

ModelName = Annotated[str, Choice("model", models.names(task="classification"))]


@settings
class ClassificationConfig(FineTuningConfig):
    """Train a network to classify images."""

    task: ClassVar[str] = "classification"

    model: ModelName = "resnet8"
    """Network to train."""
    norm: Literal["batch", "frozen_batch", "group", "instance", "none"] | None = None
    """Normalization of the layers, if not the network's own; frozen_batch keeps the
    statistics, scales and biases of the pretrained weights."""
    label_smoothing: Fraction[float] = 0.0
    """Share of the label that is spread over all classes."""
    weights: AnyPath | None = None
    """Safetensors to fine-tune from; the last layer starts anew if it does not fit."""
    new_head: bool = False
    """Start the last layer anew even if it fits, for other classes of equal number."""

    def __post_init__(self) -> None:
        FineTuningConfig.__post_init__(self)
        self.check_network(self.model, self.norm, self.weights, "weights")
        if self.new_head and self.weights is None:
            raise UsageError(
                "new_head is for pretrained weights: name a file with weights, or "
                "leave new_head out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """The task, for images of one size; see `train.tasks.base.Task`.

    Attributes:
      config: the settings of the run.
      class_names: names of the classes.
      image_shape: (height, width, channels) of the images that the network sees.
      augment: augments and normalizes training images.
      normalize: crops and normalizes other images.
    """

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    input_name: ClassVar[str] = "image"
    config_type: ClassVar[type[TrainingConfig]] = ClassificationConfig

    config: ClassificationConfig
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    augment: Augmentation
    normalize: Augmentation

    @classmethod
    def create(cls, config: ClassificationConfig, dataset: Dataset) -> "Classification":
        """Makes the task for the images and classes of a dataset."""
        if dataset.num_classes < 2:
            raise UsageError(
                f"{dataset.name} has only one class: there is nothing to learn"
            )
        normalize, channels = make_normalize(config, dataset)
        size = config.data.training_size(dataset)
        return cls(
            config=config,
            class_names=dataset.class_names,
            image_shape=(*size, channels),
            augment=config.data.augmentation(dataset, normalize),
            normalize=augment.chain(augment.center_crop(size), normalize),
        )

    def create_networks(self, rngs: nnx.Rngs) -> Networks:
        """Makes one network, "model".

        Raises:
          UsageError: if its last layer alone is to be trained, but is not known.
        """
        height, width, channels = self.image_shape
        name = self.config.model
        options: dict[str, Any] = {
            "num_classes": len(self.class_names),
            "in_channels": channels,
        }
        if "image_size" in models.describe(name).options:
            # The network itself refuses images that are not square, and says so.
            options["image_size"] = min(height, width)
        if self.config.norm is not None:
            options["norm"] = self.config.norm
        network = models.create(name, rngs=rngs, dtype=self.config.dtype, **options)
        if self.config.freeze == "backbone":
            if not network.head_paths:
                raise UsageError(
                    f"freeze 'backbone' needs a network whose last layer is known, got "
                    f"{name}: take another network, or leave freeze out"
                )
            freeze(network, trained=network.head_paths)
        return {"model": network}

    def load_weights(self, networks: Networks) -> str:
        """Loads the weights to fine-tune from; a head that does not fit starts anew.

        Returns:
          A line that says what became of the head.

        Raises:
          UsageError: if the file is missing or is for another network.
        """
        path, channels = self.config.weights, self.image_shape[-1]
        if path is None:
            return ""
        for new_head in (True,) if self.config.new_head else (False, True):
            try:
                models.load_weights(networks["model"], path, new_head=new_head)
            except (OSError, ValueError) as error:
                problem = error
            else:
                return self._about_head(networks["model"], new_head)
        hint = ""
        if channels == 1 and isinstance(problem, ValueError):  # the file was read
            hint = (
                "\nif the file is for RGB images, normalization 'imagenet' turns these "
                "gray ones into RGB"
            )
        raise UsageError(f"weights: {problem}{hint}") from problem

    def _about_head(self, network: models.Network, new_head: bool) -> str:
        """Says whether the head is pretrained."""
        head = f"the head ({', '.join(network.head_paths)})"
        if not new_head:
            return f"{head} is kept from {self.config.weights}, with its classes"
        if self.config.new_head:
            return f"{head} starts anew, as new_head says"
        classes = len(self.class_names)
        file = self.config.weights
        return f"{head} starts anew, as {file} has none for {classes} classes"

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Returns the optimizer settings of the run."""
        del name
        return self.config.optimizer

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Augments and normalizes images."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Networks, batch: Batch
    ) -> tuple[SumAndCount, Metrics]:
        """Returns the cross-entropy and the accuracy."""
        logits, labels = networks[name](batch["image"]), batch["label"]
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), self.config.label_smoothing
        )
        losses = optax.softmax_cross_entropy(logits, targets)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        count = jnp.float32(labels.size)
        return (losses.sum(), count), {"accuracy": (correct.sum(), count)}

    def evaluate(
        self, networks: Networks, batch: Batch, weights: Float[Array, " batch"]
    ) -> Sums:
        """Returns the sum of the loss, without smoothing, and the confusion matrix."""
        labels = batch["label"]
        logits = self._logits(networks, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        predicted = logits.argmax(axis=-1)
        sums: Sums = {
            "loss": (losses * weights).sum(),
            "confusion": confusion_matrix(
                labels, predicted, weights > 0, len(self.class_names)
            ),
        }
        if len(self.class_names) > _TOP:
            _, best = jax.lax.top_k(logits, _TOP)
            found = (best == labels[:, None]).any(axis=-1)
            sums["top5"] = (found * weights).sum()
        return sums

    def scores(self, sums: Sums) -> dict[str, float]:
        """Returns loss, accuracy and, for more than five classes, top-5 accuracy."""
        confusion = sums["confusion"]
        count = confusion.sum()
        scores = {
            "loss": sums["loss"] / count,
            "accuracy": np.trace(confusion) / count,
        }
        if "top5" in sums:
            scores["top5"] = sums["top5"] / count
        return {name: float(score) for name, score in scores.items()}

    def predict(
        self, networks: Networks, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Returns the probabilities of the classes for stored images."""
        return jax.nn.softmax(self._logits(networks, images))

    def save_figures(
        self,
        folder: Path,
        sums: Sums,
        batch: Mapping[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `confusion_matrix.png`."""
        del batch, predictions
        plots.save_confusion_matrix(
            sums["confusion"], self.class_names, folder / "confusion_matrix.png"
        )

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[Prediction]:
        """Saves the photos, with their classes, as `predictions.png`.

        Returns:
          The most likely classes of each photo, and the probability of each class.
        """
        del names
        titles = [
            shares_in_words(shares, self.class_names, 1) for shares in predictions
        ]
        plots.save_images(
            {"photo": photos}, folder / "predictions.png", captions=titles
        )
        return [
            Prediction(
                shares_in_words(shares, self.class_names),
                [
                    ("class", self.class_names[shares.argmax()]),
                    *zip(self.class_names, map("{:.6f}".format, shares), strict=True),
                ],
            )
            for shares in predictions
        ]

    def save_comparison(
        self,
        path: Path,
        batch: Mapping[str, np.ndarray],
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Draws photos under their class and what each run takes it for."""
        titles = []
        for i, label in enumerate(batch["label"]):
            lines = [self.class_names[label]]
            for run, shares in predictions.items():
                best = shares_in_words(shares[i], self.class_names, 1)
                lines.append(f"{run}: {best}")
            titles.append("\n".join(lines))
        plots.save_images({"image": batch["image"]}, path, captions=titles)

    def _logits(
        self, networks: Networks, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        batch = self.normalize(jax.random.key(0), {"image": images})
        return networks["model"](batch["image"])
