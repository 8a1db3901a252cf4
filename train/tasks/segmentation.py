"""Segmentation: the class of every pixel, cross-entropy, intersection over union."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.patches import Patch
from PIL import Image

import models
from train import figures
from train.config import TrainingConfig
from train.data import Dataset, augment, open_prepared
from train.data.augment import Augmentation
from train.data.config import DataConfig
from train.errors import UsageError
from train.metrics import confusion_matrix, intersection_over_union
from train.optimizers import OptimizerConfig
from train.progress import Progress, silent
from train.step import Metrics, Models
from train.tasks._checks import check_images
from train.tasks._words import in_words

NAME = "segmentation"
METRIC = "mean_iou"

ModelName = tyro.extras.literal_type_from_choices(models.names(task=NAME))

# Height and width that all networks here take are multiples of it.
_STRIDE = 8
_SAMPLES = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationConfig(TrainingConfig):
    """Train a network to tell the class of every pixel."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: DataConfig(dataset="digit_scenes")
    )
    model: ModelName = "unet_small"
    """Network to train."""
    epochs: int = 4
    """Passes over the training examples."""
    batch_size: int = 8
    """Examples in a step, over all devices."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(
            default_factory=lambda: OptimizerConfig(
                optimizer="adam",
                learning_rate=3e-3,
                weight_decay=0.0,
                schedule="poly",
            )
        )
    )
    class_weights: Literal["none", "balanced"] = "none"
    """Of pixels in the loss; balanced is median frequency over that of their class."""
    backbone_weights: Path | None = None
    """Safetensors of a classifier, for the ResNet inside PSPNet and DUC-HDC."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        models.describe(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segmentation:
    """The task, for images with masks.

    Attributes:
      config: how to train.
      class_names: names of the classes to tell.
      colors: uint8 (classes, 3), how to draw them.
      class_weights: of the pixels of each class in the loss.
      ignore_label: value of mask pixels without a class.
      in_channels: channels of the images.
      augment: random changes of training examples, and their normalisation.
      normalize: normalisation alone.
    """

    config: SegmentationConfig
    class_names: tuple[str, ...]
    colors: np.ndarray
    class_weights: tuple[float, ...]
    ignore_label: int
    in_channels: int
    augment: Augmentation
    normalize: Augmentation

    def create_models(self, rngs: nnx.Rngs) -> Models:
        """A network for these images and classes, called "model"."""
        network = models.create(
            self.config.model,
            rngs=rngs,
            num_classes=len(self.class_names),
            in_channels=self.in_channels,
            dtype=self.config.dtype,
        )
        return {"model": network}

    def load(self, networks: Models) -> None:
        """Reads the weights of the backbone, if the config names some.

        Raises:
          UsageError: if there is no backbone, or the file is missing or is not of it.
        """
        path = self.config.backbone_weights
        if path is None:
            return
        network = networks["model"]
        if not hasattr(network, "backbone"):
            raise UsageError(
                f"{self.config.model} has no backbone: leave --backbone-weights out"
            )
        try:
            models.load_weights(network.backbone, path, new_head=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"--backbone-weights: {error}") from error

    def optimizer_for(self, name: str) -> OptimizerConfig:
        """By what the network is trained."""
        del name
        return self.config.optimizer

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        """Augments and normalises images, and moves masks along."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Models, batch: Any
    ) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy of labelled pixels, and accuracy, of a prepared batch.

        With what auxiliary logits add to it, where the network has them. A batch
        without labels has the loss 0.
        """
        network, mask = networks[name], batch["mask"]
        if hasattr(network, "with_auxiliary"):
            logits, auxiliary = _on_multiples(network.with_auxiliary, batch["image"])
            extra = network.AUXILIARY_WEIGHT * _mean(*self._losses(auxiliary, mask))
        else:
            logits, extra = _on_multiples(network, batch["image"]), 0.0
        labelled = mask != self.ignore_label
        correct = labelled & (logits.argmax(axis=-1) == mask)
        count = labelled.sum(dtype=jnp.float32)
        metrics = {
            "pixel_accuracy": (
                correct.sum(dtype=jnp.float32),
                # A batch without labels has none right, and no NaN.
                jnp.maximum(count, 1),
            )
        }
        return _mean(*self._losses(logits, mask)) + extra, metrics

    def evaluate(self, networks: Models, batch: Any) -> dict[str, jax.Array]:
        """Sums of the loss and its weights, and what pixels were taken for."""
        logits = self._logits(networks, batch["image"])
        there = batch["weight"].reshape(-1, 1, 1) > 0
        mask = jnp.where(there, batch["mask"], self.ignore_label)
        losses, weights = self._losses(logits, mask)
        return {
            "loss": losses.sum(),
            "weight": weights.sum(),
            "confusion": confusion_matrix(
                mask,
                logits.argmax(axis=-1),
                mask != self.ignore_label,
                len(self.class_names),
            ),
        }

    def scores(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        """Loss, pixel accuracy, mean IoU and that of each class.

        The mean is over the classes that occur in truth or prediction; a class has an
        entry of its own if it occurs in truth.
        """
        confusion = totals["confusion"].astype(np.int64)
        count = max(confusion.sum(), 1)
        iou = intersection_over_union(confusion)
        occurs = ~np.isnan(iou)
        return {
            "loss": float(totals["loss"] / max(totals["weight"], 1e-12)),
            "mean_iou": float(iou[occurs].mean()) if occurs.any() else 0.0,
            "pixel_accuracy": float(np.trace(confusion) / count),
            **{
                f"iou_{name}": float(value)
                for name, value, pixels in zip(
                    self.class_names, iou, confusion.sum(axis=1), strict=True
                )
                if pixels
            },
        }

    def predict(self, networks: Models, images: jax.Array) -> jax.Array:
        """The class of each pixel, int32 (batch, height, width), of stored images."""
        return self._logits(networks, images).argmax(axis=-1).astype(jnp.int32)

    def save_figures(
        self,
        folder: Path,
        totals: dict[str, np.ndarray],
        batch: dict[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `samples.png`, photo, truth and prediction, and `iou.png`."""
        columns, legend = self.columns(batch, {"prediction": predictions})
        figures.save_comparison(folder / "samples.png", columns, legend)
        iou = intersection_over_union(totals["confusion"])
        figures.save_bars(
            dict(zip(self.class_names, iou.tolist(), strict=True)),
            self.scores(totals)["mean_iou"],
            folder / "iou.png",
            label="intersection over union",
        )

    def columns(
        self, batch: dict[str, np.ndarray], predictions: dict[str, np.ndarray]
    ) -> tuple[figures.Columns, list[Patch]]:
        """What to lay side by side: photo, prediction of each run by title, truth."""
        masks = {"truth": batch["mask"], **predictions}
        colors, ignore_label = self.colors, self.ignore_label
        columns = [("photo", batch["image"])]
        columns += [
            (title, [figures.painted(x, colors, ignore_label) for x in drawn])
            for title, drawn in masks.items()
        ]
        drawn = [mask for found in masks.values() for mask in found]
        return columns, figures.class_legend(
            drawn, self.class_names, colors, ignore_label
        )

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[str]:
        """Writes `NAME.png` to look at and `NAME-classes.png`, the class of each pixel.

        Returns:
          The largest classes of each photo, in words.
        """
        lines = []
        for name, photo, mask in zip(names, photos, predictions, strict=True):
            image = Image.fromarray(mask.astype(np.uint8))
            image = image.resize(photo.shape[1::-1], Image.Resampling.NEAREST)
            image.save(folder / f"{name}-classes.png")
            mask = np.asarray(image)
            painted = figures.painted(mask, self.colors, self.ignore_label)
            figures.save_comparison(
                folder / f"{name}.png",
                [("photo", [photo]), ("prediction", [painted])],
                figures.class_legend(
                    [mask], self.class_names, self.colors, self.ignore_label
                ),
            )
            shares = np.bincount(mask.ravel(), minlength=len(self.class_names))
            lines.append(in_words(shares / mask.size, self.class_names))
        return lines

    def _logits(self, networks: Models, images: jax.Array) -> jax.Array:
        batch = self.normalize(jax.random.key(0), {"image": images})
        return _on_multiples(networks["model"], batch["image"])

    def _losses(
        self, logits: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Weighted cross-entropy of each pixel, and the weights: 0 where ignored."""
        labelled = mask != self.ignore_label
        labels = jnp.where(labelled, mask, 0).astype(jnp.int32)
        weights = jnp.where(labelled, jnp.array(self.class_weights)[labels], 0.0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses * weights, weights


def _mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    total = weights.sum()
    return losses.sum() / jnp.where(total > 0, total, 1)


def _on_multiples(network: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """Logits of images of any size: padded with the mean colour, then cut back."""
    height, width = images.shape[1:3]
    sides = [(0, 0), (0, -height % _STRIDE), (0, -width % _STRIDE), (0, 0)]
    logits = network(jnp.pad(images, sides))
    return jax.tree.map(lambda x: x[:, :height, :width], logits)


def make_task(
    config: SegmentationConfig,
    dataset: Dataset,
    class_weights: Sequence[float] | None = None,
) -> Segmentation:
    """The task that a config describes, for such data.

    Args:
      config: the config.
      dataset: the data; examples are not read.
      class_weights: of the pixels of each class in the loss; 1 if unset.

    Raises:
      UsageError: if config and data do not fit each other.
    """
    colors = dataset.colors
    if colors is None:
        colors = figures.class_colors(dataset.num_classes)
    normalize = augment.normalize(dataset.mean, dataset.std)
    return Segmentation(
        config=config,
        class_names=dataset.class_names,
        colors=colors,
        class_weights=tuple(class_weights or (1.0,) * dataset.num_classes),
        ignore_label=dataset.split("train").reader.ignore_label,
        in_channels=len(dataset.mean),
        augment=config.data.augmentation(dataset, normalize),
        normalize=normalize,
    )


def open_task(
    config: SegmentationConfig, progress: Progress = silent
) -> tuple[Segmentation, Dataset]:
    """Loads the data and makes the task that a config describes.

    Raises:
      UsageError: if they do not fit each other, or masks have undeclared values.
    """
    dataset = config.data.load(NAME, progress)
    counts = _pixel_counts(config.data, dataset, progress)
    weights = None
    if config.class_weights == "balanced":
        weights = _balanced(counts["train"]).tolist()
    task = make_task(config, dataset, weights)
    check_images(task, dataset)
    return task, dataset


def _pixel_counts(
    config: DataConfig, dataset: Dataset, progress: Progress
) -> dict[str, np.ndarray]:
    """Pixels of each class in each split as it was prepared.

    Raises:
      UsageError: if there are pixels of other values.
    """
    prepared = open_prepared(config.dataset, data_dir=config.data_dir)
    key = prepared.fields(NAME)["mask"].key
    ignore_label = dataset.split("train").reader.ignore_label
    found = {}
    for split, statistics in prepared.statistics(progress).items():
        counts = np.zeros(256, np.int64)
        measured = statistics.counts[key]
        counts[: len(measured)] = measured
        counts[ignore_label] = 0
        strange = np.flatnonzero(counts[dataset.num_classes :]) + dataset.num_classes
        if strange.size:
            raise UsageError(
                f"masks of {dataset.name} ({split}) have the values "
                f"{', '.join(map(str, strange))}, but there are {dataset.num_classes} "
                f"classes and the ignored label {ignore_label}: prepare the dataset "
                "again with all its classes"
            )
        found[split] = counts[: dataset.num_classes]
    return found


def _balanced(counts: np.ndarray) -> np.ndarray:
    """Median frequency over that of each class; 0 for classes without a pixel."""
    median = np.median(counts[counts > 0])
    return np.divide(median, counts, out=np.zeros(len(counts)), where=counts > 0)
