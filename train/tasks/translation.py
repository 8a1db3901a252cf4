"""Translation of images into images by a conditional GAN, as in pix2pix."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.patches import Patch
from PIL import Image

import models
from train import figures
from train.config import TrainingConfig
from train.data import Dataset, augment
from train.data.augment import Augmentation
from train.data.config import DataConfig
from train.errors import UsageError
from train.metrics import psnr, ssim
from train.optimizers import OptimizerConfig
from train.progress import Progress, silent
from train.step import Metrics, Models
from train.tasks._checks import check_images

NAME = "translation"
METRIC = "l1"

GeneratorName = tyro.extras.literal_type_from_choices(models.names("unet*", task=NAME))
DiscriminatorName = tyro.extras.literal_type_from_choices(
    models.names("*gan*", task=NAME)
)

_SAMPLES = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TranslationConfig(TrainingConfig):
    """Train a network to translate images, against one that tells them from real."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: DataConfig(dataset="digit_scenes")
    )
    generator: GeneratorName = "unet64_small"
    """Network that translates."""
    discriminator: DiscriminatorName = "patchgan16"
    """Network that tells its images from real ones, beside the input."""
    norm: Literal["batch", "instance"] = "batch"
    """Normalisation in both; with one image in a step they are alike in training."""
    dropout_at_test: bool = False
    """Dropout stays on where the network is used, as in the paper."""
    epochs: int = 2
    """Passes over the training examples."""
    batch_size: int = 4
    """Examples in a step, over all devices."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(
            default_factory=lambda: OptimizerConfig(
                optimizer="adam",
                learning_rate=2e-4,
                momentum=0.5,
                weight_decay=0.0,
                schedule="linear",
            )
        )
    )
    tricks_on: Literal["generator", "both"] = "generator"
    """Networks whose optimizers have the tricks."""
    gan_loss: Literal["bce", "lsgan"] = "bce"
    """Cross-entropy, or squared distance from 1 for real and 0 for made."""
    l1_weight: float = 100.0
    """Of the mean absolute error beside the generator's part of that loss."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        models.describe(self.generator)
        models.describe(self.discriminator)
        if not self.l1_weight >= 0:
            raise UsageError(f"l1_weight must be >= 0, got {self.l1_weight}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """The task, for pairs of images.

    Images of a pair are float32 from -1 to 1 in a prepared batch. Other images, which
    are uint8, are cut around their centre to `size`.

    Attributes:
      config: how to train.
      size: (height, width) of the images that are translated.
      in_channels: channels of the inputs.
      out_channels: channels of the targets.
      augment: random changes of pairs, and their scaling.
    """

    config: TranslationConfig
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    augment: Augmentation

    def create_models(self, rngs: nnx.Rngs) -> Models:
        """The "discriminator" and then the "generator"."""
        config = self.config
        shared = {"rngs": rngs, "norm": config.norm, "dtype": config.dtype}
        discriminator = models.create(
            config.discriminator,
            in_channels=self.in_channels + self.out_channels,
            **shared,
        )
        generator = models.create(
            config.generator,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            dropout_at_test=config.dropout_at_test,
            **shared,
        )
        return {"discriminator": discriminator, "generator": generator}

    def load(self, networks: Models) -> None:
        """Does nothing: both start from random weights, as in the paper."""

    def optimizer_for(self, name: str) -> OptimizerConfig:
        """By what a network is trained: the tricks are the generator's, or both's."""
        optimizer = self.config.optimizer
        if name == "discriminator" and self.config.tricks_on == "generator":
            return dataclasses.replace(optimizer, tricks=())
        return optimizer

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        """Augments pairs and scales them."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Models, batch: Any
    ) -> tuple[jax.Array, Metrics]:
        """What a network minimises over a prepared batch.

        The discriminator's objective is halved, as in the paper. Its made images are
        those of the generator before the step, which the generator's loss has too.
        """
        inputs, targets = batch["input"], batch["target"]
        made = networks["generator"](inputs)

        def judged(images: jax.Array) -> jax.Array:
            return networks["discriminator"](jnp.concatenate((inputs, images), -1))

        if name == "discriminator":
            real, fake = judged(targets), judged(jax.lax.stop_gradient(made))
            return (self._gan_loss(real, True) + self._gan_loss(fake, False)) / 2, {}
        gan, l1 = self._gan_loss(judged(made), True), jnp.abs(made - targets).mean()
        metrics = {
            "gan": (gan, jnp.float32(1)),
            "l1": (l1 / 2, jnp.float32(1)),  # of images from 0 to 1
        }
        return gan + self.config.l1_weight * l1, metrics

    def evaluate(self, networks: Models, batch: Any) -> dict[str, jax.Array]:
        """Sums of L1, PSNR and SSIM of the generator's images."""
        pair = _scaled(jax.random.key(0), self._cut(batch))
        # From 0 to 1.
        made, target = (
            (x + 1) / 2 for x in (networks["generator"](pair["input"]), pair["target"])
        )
        weight = batch["weight"]
        values = {
            "l1": jnp.abs(made - target).mean(axis=(1, 2, 3)),
            "psnr": psnr(made, target),
            "ssim": ssim(made, target),
        }
        totals = {name: (value * weight).sum() for name, value in values.items()}
        return totals | {"count": weight.sum()}

    def scores(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        """Means over images: L1 from 0 to 1, PSNR in decibels, SSIM."""
        names = ("l1", "psnr", "ssim")
        return {name: float(totals[name] / totals["count"]) for name in names}

    def predict(self, networks: Models, images: jax.Array) -> jax.Array:
        """Translates stored inputs, cut around their centre: uint8 images."""
        batch = _scaled(jax.random.key(0), self._cut({"input": images}))
        made = networks["generator"](batch["input"])
        return jnp.round((made + 1) * 127.5).astype(jnp.uint8)

    def save_figures(
        self,
        folder: Path,
        totals: dict[str, np.ndarray],
        batch: dict[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `samples.png`: input, output and truth."""
        del totals
        columns, _ = self.columns(batch, {"output": predictions})
        figures.save_comparison(folder / "samples.png", columns)

    def columns(
        self, batch: dict[str, np.ndarray], predictions: dict[str, np.ndarray]
    ) -> tuple[figures.Columns, list[Patch]]:
        """What to lay side by side: input, output of each run by its title, truth."""
        pair = jax.device_get(self._cut({k: batch[k] for k in ("input", "target")}))
        images = {"input": pair["input"], **predictions, "truth": pair["target"]}
        return list(images.items()), []

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[str]:
        """Writes `NAME.png`, of the photo's size, and returns what it did to each."""
        for name, photo, made in zip(names, photos, predictions, strict=True):
            image = Image.fromarray(made[..., 0] if made.shape[-1] == 1 else made)
            image.resize(photo.shape[1::-1]).save(folder / f"{name}.png")
        return [f"translated, {name}.png" for name in names]

    def _gan_loss(self, logits: jax.Array, real: bool) -> jax.Array:
        """Of the judgement that patches are real, or made."""
        if self.config.gan_loss == "lsgan":
            return jnp.square(logits - real).mean()
        return jax.nn.softplus(-logits if real else logits).mean()

    def _cut(self, batch: Any) -> Any:
        return augment.center_crop(self.size)(jax.random.key(0), batch)


def _scaled(key: jax.Array, batch: Any) -> Any:
    """Images from -1 to 1, whatever the key."""
    del key
    names = batch.keys() & {"input", "target"}
    return batch | {n: batch[n].astype(jnp.float32) / 127.5 - 1 for n in names}


def make_task(config: TranslationConfig, dataset: Dataset) -> Translation:
    """The task that a config describes, for such data.

    Raises:
      UsageError: if they do not fit each other.
    """
    fields = dataset.split("train").reader.fields
    return Translation(
        config=config,
        size=config.data.training_size(dataset),
        in_channels=fields["input"].channels,
        out_channels=fields["target"].channels,
        augment=config.data.augmentation(dataset, _scaled),
    )


def open_task(
    config: TranslationConfig, progress: Progress = silent
) -> tuple[Translation, Dataset]:
    """Loads the data and makes the task that a config describes.

    Raises:
      UsageError: if they do not fit each other.
    """
    dataset = config.data.load(NAME, progress)
    task = make_task(config, dataset)
    check_images(task, dataset)
    return task, dataset
