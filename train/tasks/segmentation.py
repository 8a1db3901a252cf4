"""Segmentation, which predicts the class of every pixel."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Key, UInt8
from PIL import Image

import models
from train import plots
from train.config import TrainingConfig
from train.data import Dataset
from train.data.augment import Augmentation
from train.data.config import DataConfig
from train.errors import UsageError
from train.metrics import confusion_matrix, intersection_over_union
from train.optim.config import OptimizerConfig
from train.settings import AnyPath, Choice, settings
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

# All segmentation networks take heights and widths that are multiples of this.
_STRIDE = 8

ModelName = Annotated[str, Choice("model", models.names(task="segmentation"))]


@settings
class SegmentationConfig(FineTuningConfig):
    """Train a network to classify every pixel."""

    task: ClassVar[str] = "segmentation"

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: DataConfig(dataset="digit_scenes")
    )
    model: ModelName = "unet_small"
    """Network to train."""
    norm: Literal["batch", "group", "instance", "none"] | None = None
    """Normalization of the layers, if not the network's own."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 4
    """Passes over the training examples."""
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 8
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
    """Weights of pixels in the loss; balanced is the median class frequency divided by
    the frequency of the pixel's class."""
    backbone_weights: AnyPath | None = None
    """Safetensors of a classifier, for the backbone of PSPNet and DUC-HDC."""

    def __post_init__(self) -> None:
        FineTuningConfig.__post_init__(self)
        self.check_network(
            self.model, self.norm, self.backbone_weights, "backbone_weights"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segmentation:
    """The task, for images with masks; see `train.tasks.base.Task`.

    Attributes:
      config: the settings of the run.
      class_names: names of the classes.
      colors: colors to draw them in, uint8 (classes, 3).
      class_weights: weights of the pixels of each class in the loss.
      ignore_label: value of mask pixels without a class.
      in_channels: channels of the images.
      augment: augments and normalizes training examples.
      normalize: normalizes images for evaluation and prediction.
    """

    name: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "mean_iou"
    input_name: ClassVar[str] = "image"
    config_type: ClassVar[type[TrainingConfig]] = SegmentationConfig

    config: SegmentationConfig
    class_names: tuple[str, ...]
    colors: np.ndarray
    class_weights: tuple[float, ...]
    ignore_label: int
    in_channels: int
    augment: Augmentation
    normalize: Augmentation

    @classmethod
    def create(cls, config: SegmentationConfig, dataset: Dataset) -> "Segmentation":
        """Makes the task for the images and classes of a dataset.

        Raises:
          UsageError: if masks have values that are neither a class nor the ignored
            label.
        """
        ignore_label = dataset.split("train").reader.ignore_label
        counts = _pixel_counts(dataset, ignore_label)
        weights = np.ones(dataset.num_classes)
        if config.class_weights == "balanced" and "train" in counts:
            weights = _balanced(counts["train"])
        colors = dataset.colors
        if colors is None:
            colors = plots.class_colors(dataset.num_classes)
        normalize, channels = make_normalize(config, dataset)
        return cls(
            config=config,
            class_names=dataset.class_names,
            colors=colors,
            class_weights=tuple(weights.tolist()),
            ignore_label=ignore_label,
            in_channels=channels,
            augment=config.data.augmentation(dataset, normalize),
            normalize=normalize,
        )

    def create_networks(self, rngs: nnx.Rngs) -> Networks:
        """Makes one network, "model".

        Raises:
          UsageError: if its backbone is to be kept, but there is none.
        """
        norm = self.config.norm
        network = models.create(
            self.config.model,
            rngs=rngs,
            num_classes=len(self.class_names),
            in_channels=self.in_channels,
            dtype=self.config.dtype,
            **({} if norm is None else {"norm": norm}),
        )
        if self.config.freeze == "backbone":
            if network.backbone is None:
                raise UsageError(
                    f"{self.config.model} has no backbone: leave freeze out, or take "
                    "another network"
                )
            freeze(network.backbone)
        return {"model": network}

    def load_weights(self, networks: Networks) -> str:
        """Loads the weights of the backbone, if the config names a file.

        Returns:
          A line that says so.

        Raises:
          UsageError: if there is no backbone, or the file is missing or is for another
            network.
        """
        path = self.config.backbone_weights
        if path is None:
            return ""
        backbone = networks["model"].backbone
        if backbone is None:
            raise UsageError(
                f"{self.config.model} has no backbone: leave backbone_weights out"
            )
        try:
            models.load_weights(backbone, path, new_head=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"backbone_weights: {error}") from error
        return f"the backbone is that of {path}, and the head starts anew"

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Returns the optimizer settings of the run."""
        del name
        return self.config.optimizer

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Augments images and masks together, and normalizes images."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Networks, batch: Batch
    ) -> tuple[SumAndCount, Metrics]:
        """Returns the cross-entropy and the accuracy of labeled pixels.

        If the network has auxiliary logits, their weighted loss is added. The count of
        the loss is the sum of the class weights of the pixels.
        """
        network, mask = networks[name], batch["mask"]
        logits, auxiliary = _on_multiples(network.with_auxiliary, batch["image"])
        losses, weights = self._losses(logits, mask)
        total = losses.sum()
        if auxiliary is not None:
            losses, _ = self._losses(auxiliary, mask)
            total += network.auxiliary_weight * losses.sum()
        labeled = mask != self.ignore_label
        correct = labeled & (logits.argmax(axis=-1) == mask)
        count = labeled.sum(dtype=jnp.float32)
        metrics = {"pixel_accuracy": (correct.sum(dtype=jnp.float32), count)}
        return (total, weights.sum()), metrics

    def evaluate(
        self, networks: Networks, batch: Batch, weights: Float[Array, " batch"]
    ) -> Sums:
        """Returns the sum of the weighted losses, and the confusion matrix."""
        logits = self._logits(networks, batch["image"])
        is_example = weights.reshape(-1, 1, 1) > 0
        mask = jnp.where(is_example, batch["mask"], self.ignore_label)
        losses, _ = self._losses(logits, mask)
        return {
            "loss": losses.sum(),
            "confusion": confusion_matrix(
                mask,
                logits.argmax(axis=-1),
                mask != self.ignore_label,
                len(self.class_names),
            ),
        }

    def scores(self, sums: Sums) -> dict[str, float]:
        """Returns loss, pixel accuracy, mean IoU, and the IoU of each class.

        The mean is over the classes that occur in the truth or in the predictions.
        Only classes that occur in the truth have their own IoU.
        """
        confusion = sums["confusion"].astype(np.int64)
        count = max(confusion.sum(), 1)
        weight = confusion.sum(axis=1) @ np.array(self.class_weights)
        iou = intersection_over_union(confusion)
        occurs = ~np.isnan(iou)
        return {
            "loss": float(sums["loss"] / max(weight, 1e-12)),
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

    def predict(
        self, networks: Networks, images: UInt8[Array, "batch height width channels"]
    ) -> Int32[Array, "batch height width"]:
        """Returns the class of each pixel of stored images."""
        return self._logits(networks, images).argmax(axis=-1).astype(jnp.int32)

    def save_figures(
        self,
        folder: Path,
        sums: Sums,
        batch: Mapping[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `samples.png` (photos, truth and predictions) and `iou.png`."""
        self.save_comparison(folder / "samples.png", batch, {"prediction": predictions})
        iou = intersection_over_union(sums["confusion"])
        plots.save_bars(
            dict(zip(self.class_names, iou.tolist(), strict=True)),
            self.scores(sums)["mean_iou"],
            folder / "iou.png",
            label="intersection over union",
        )

    def save_comparison(
        self,
        path: Path,
        batch: Mapping[str, np.ndarray],
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Draws photo, truth and the prediction of each run side by side."""
        masks = {"truth": batch["mask"], **predictions}
        drawn = {name: list(found) for name, found in masks.items()}
        self._save_masks(path, list(batch["image"]), drawn)

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[Prediction]:
        """Saves `NAME-drawn.png`, and the class of each pixel as `NAME-classes.png`.

        Returns:
          The classes with the largest areas of each photo.
        """
        made = []
        for name, photo, mask in zip(names, photos, predictions, strict=True):
            image = Image.fromarray(mask.astype(np.uint8))
            image = image.resize(photo.shape[1::-1], Image.Resampling.NEAREST)
            # One suffix each, or the mask of x.png would replace that of x-classes.png.
            drawn, classes = f"{name}-drawn.png", f"{name}-classes.png"
            image.save(folder / classes)
            mask = np.asarray(image)
            self._save_masks(folder / drawn, [photo], {"prediction": [mask]})
            shares = np.bincount(mask.ravel(), minlength=len(self.class_names))
            line = shares_in_words(shares / mask.size, self.class_names)
            made.append(Prediction(line, [("drawn", drawn), ("classes", classes)]))
        return made

    def _save_masks(
        self,
        path: Path,
        photos: Sequence[np.ndarray],
        masks: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        plots.save_masks(
            photos,
            masks,
            path,
            class_names=self.class_names,
            colors=self.colors,
            ignore_label=self.ignore_label,
        )

    def _logits(
        self, networks: Networks, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width classes"]:
        batch = self.normalize(jax.random.key(0), {"image": images})
        return _on_multiples(networks["model"], batch["image"])

    def _losses(
        self,
        logits: Float[Array, "batch height width classes"],
        mask: Int[Array, "batch height width"],
    ) -> tuple[Float[Array, "batch height width"], Float[Array, "batch height width"]]:
        """Returns the weighted cross-entropy of each pixel, and its weight.

        Ignored pixels have a weight of 0.
        """
        labeled = mask != self.ignore_label
        labels = jnp.where(labeled, mask, 0).astype(jnp.int32)
        weights = jnp.where(labeled, jnp.array(self.class_weights)[labels], 0.0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses * weights, weights


def _on_multiples(network: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """Returns logits for normalized images of any size.

    The images are padded with the mean color, 0, to a size that the network takes. The
    logits are cropped to the size of the images.
    """
    height, width = images.shape[1:3]
    sides = [(0, 0), (0, -height % _STRIDE), (0, -width % _STRIDE), (0, 0)]
    logits = network(jnp.pad(images, sides))
    return jax.tree.map(lambda x: x[:, :height, :width], logits)


def _pixel_counts(dataset: Dataset, ignore_label: int) -> dict[str, np.ndarray]:
    """Returns the number of pixels of each class in each prepared split.

    Raises:
      UsageError: if pixels have values that are neither a class nor the ignored label.
    """
    found = {}
    for split, all_counts in dataset.class_counts.items():
        counts = all_counts.copy()
        counts[ignore_label] = 0
        undeclared = np.flatnonzero(counts[dataset.num_classes :])
        if undeclared.size:
            values = ", ".join(str(v + dataset.num_classes) for v in undeclared)
            raise UsageError(
                f"masks of {dataset.name} ({split}) have the values {values}, but "
                f"there are {dataset.num_classes} classes and the ignored label "
                f"{ignore_label}: prepare the dataset again with all its classes"
            )
        found[split] = counts[: dataset.num_classes]
    return found


def _balanced(counts: np.ndarray) -> np.ndarray:
    """Returns the median frequency over the frequency of each class.

    A class without pixels has a weight of 0.
    """
    median = np.median(counts[counts > 0])
    return np.divide(median, counts, out=np.zeros(len(counts)), where=counts > 0)
