"""Translation of images into images by a conditional GAN, as in pix2pix."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import tyro
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from PIL import Image

import models
from train import plots
from train.config import TrainingConfig
from train.data import Dataset, augment
from train.data.augment import Augmentation
from train.data.config import DataConfig
from train.metrics import psnr, ssim
from train.optim.config import OptimizerConfig
from train.settings import Choice, NonNegative, settings
from train.tasks.base import Batch, Metrics, Networks, Prediction, SumAndCount, Sums

_GENERATORS = models.names("unet*", task="translation")
_DISCRIMINATORS = models.names("*gan*", task="translation")


@settings
class TranslationConfig(TrainingConfig):
    """Train a network to translate images, against a discriminator."""

    task: ClassVar[str] = "translation"

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: DataConfig(dataset="digit_scenes")
    )
    generator: Annotated[str, Choice("generator", _GENERATORS)] = "unet64_small"
    """Network that translates."""
    discriminator: Annotated[str, Choice("discriminator", _DISCRIMINATORS)] = (
        "patchgan16"
    )
    """Network that tells fake images from real ones; it sees the input as well."""
    norm: Literal["batch", "instance"] = "batch"
    """Normalization in both networks; with a batch size of 1 they train alike."""
    dropout_at_test: bool = False
    """Keep dropout on when the generator is evaluated or used, as in the paper."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 2
    """Passes over the training examples."""
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 4
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
    techniques_on: Literal["generator", "both"] = "generator"
    """Networks that are trained with the techniques."""
    gan_loss: Literal["bce", "lsgan"] = "bce"
    """Cross-entropy, or squared distance from 1 for real and from 0 for fake."""
    l1_weight: NonNegative[float] = 100.0
    """Weight of the mean absolute error beside the GAN loss of the generator."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """The task, for pairs of images; see `train.tasks.base.Task`.

    The images of a prepared batch are float32 in [-1, 1]. Other images, which are
    uint8, are cropped to `size` around their center.

    Attributes:
      config: the settings of the run.
      size: (height, width) of the images that are translated.
      in_channels: channels of the inputs.
      out_channels: channels of the targets.
      augment: augments and scales pairs.
    """

    name: ClassVar[str] = "translation"
    metric: ClassVar[str] = "l1"
    input_name: ClassVar[str] = "input"
    config_type: ClassVar[type[TrainingConfig]] = TranslationConfig

    config: TranslationConfig
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    augment: Augmentation

    @classmethod
    def create(cls, config: TranslationConfig, dataset: Dataset) -> "Translation":
        """Makes the task for the pairs of a dataset."""
        fields = dataset.split("train").reader.fields
        return cls(
            config=config,
            size=config.data.training_size(dataset),
            in_channels=fields["input"].channels,
            out_channels=fields["target"].channels,
            augment=config.data.augmentation(dataset, _scaled),
        )

    def create_networks(self, rngs: nnx.Rngs) -> Networks:
        """Makes the "discriminator" and then the "generator"."""
        config = self.config
        shared = {"norm": config.norm, "dtype": config.dtype}
        discriminator = models.create(
            config.discriminator,
            rngs=rngs,
            in_channels=self.in_channels + self.out_channels,
            **shared,
        )
        generator = models.create(
            config.generator,
            rngs=rngs,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            dropout_at_test=config.dropout_at_test,
            **shared,
        )
        return {"discriminator": discriminator, "generator": generator}

    def load_weights(self, networks: Networks) -> str:
        """Loads nothing: both start from random weights, as in the paper."""
        del networks
        return ""

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Returns the optimizer settings of a network, with or without techniques."""
        optimizer = self.config.optimizer
        if name == "discriminator" and self.config.techniques_on == "generator":
            return dataclasses.replace(optimizer, techniques=())
        return optimizer

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Augments pairs and scales them to [-1, 1]."""
        return self.augment(key, batch)

    def loss(
        self, name: str, networks: Networks, batch: Batch
    ) -> tuple[SumAndCount, Metrics]:
        """Returns the loss of the discriminator or the generator.

        Losses and metrics are means, of count 1: all images have the same weight. The
        objective of the discriminator is halved, as in the paper. Both losses are
        for the fake images of the generator as it was before the step.
        """
        inputs, targets, count = batch["input"], batch["target"], jnp.float32(1)
        fakes = networks["generator"](inputs)

        def logits(images: jax.Array) -> jax.Array:
            return networks["discriminator"](jnp.concatenate((inputs, images), -1))

        if name == "discriminator":
            real, fake = logits(targets), logits(jax.lax.stop_gradient(fakes))
            loss = (self._gan_loss(real, True) + self._gan_loss(fake, False)) / 2
            return (loss, count), {}
        gan, l1 = self._gan_loss(logits(fakes), True), jnp.abs(fakes - targets).mean()
        metrics = {"gan": (gan, count), "l1": (l1 / 2, count)}  # for images in [0, 1]
        return (gan + self.config.l1_weight * l1, count), metrics

    def evaluate(
        self, networks: Networks, batch: Batch, weights: Float[Array, " batch"]
    ) -> Sums:
        """Returns the sums of L1, PSNR and SSIM of the translated images."""
        pair = _scaled(jax.random.key(0), self._cropped(batch))
        # In [0, 1].
        fake, target = (
            (x + 1) / 2 for x in (networks["generator"](pair["input"]), pair["target"])
        )
        values = {
            "l1": jnp.abs(fake - target).mean(axis=(1, 2, 3)),
            "psnr": psnr(fake, target),
            "ssim": ssim(fake, target),
        }
        sums = {name: (value * weights).sum() for name, value in values.items()}
        return sums | {"count": weights.sum()}

    def scores(self, sums: Sums) -> dict[str, float]:
        """Returns means over images: L1 in [0, 1], PSNR in decibels, SSIM."""
        names = ("l1", "psnr", "ssim")
        return {name: float(sums[name] / sums["count"]) for name in names}

    def predict(
        self, networks: Networks, images: UInt8[Array, "batch height width channels"]
    ) -> UInt8[Array, "batch size size out_channels"]:
        """Translates stored inputs, cropped around their center."""
        batch = _scaled(jax.random.key(0), self._cropped({"input": images}))
        fakes = networks["generator"](batch["input"])
        return jnp.round((fakes + 1) * 127.5).astype(jnp.uint8)

    def save_figures(
        self,
        folder: Path,
        sums: Sums,
        batch: Mapping[str, np.ndarray],
        predictions: np.ndarray,
    ) -> None:
        """Draws `samples.png`: input, output and truth."""
        del sums
        self.save_comparison(folder / "samples.png", batch, {"output": predictions})

    def save_comparison(
        self,
        path: Path,
        batch: Mapping[str, np.ndarray],
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Draws input, the output of each run, and truth side by side."""
        stored = {name: jnp.asarray(batch[name]) for name in ("input", "target")}
        pair = jax.device_get(self._cropped(stored))
        images = {"input": pair["input"], **predictions, "truth": pair["target"]}
        plots.save_images(images, path)

    def save_predictions(
        self,
        folder: Path,
        names: Sequence[str],
        photos: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
    ) -> list[Prediction]:
        """Saves each translated image as `NAME.png`, in the size of its photo."""
        for name, photo, fake in zip(names, photos, predictions, strict=True):
            image = Image.fromarray(fake[..., 0] if fake.shape[-1] == 1 else fake)
            image.resize(photo.shape[1::-1]).save(folder / f"{name}.png")
        return [
            Prediction(f"translated, {name}.png", [("picture", f"{name}.png")])
            for name in names
        ]

    def _gan_loss(
        self, logits: Float[Array, "batch height width 1"], is_real: bool
    ) -> Float[Array, ""]:
        """Returns the loss of logits that should say real, or fake, for all patches."""
        if self.config.gan_loss == "lsgan":
            return jnp.square(logits - is_real).mean()
        return jax.nn.softplus(-logits if is_real else logits).mean()

    def _cropped(self, batch: Batch) -> Batch:
        return augment.center_crop(self.size)(jax.random.key(0), batch)


def _scaled(key: Key[Array, ""], batch: Batch) -> Batch:
    """Scales images to [-1, 1]; the key does not matter."""
    del key
    names = [name for name in ("input", "target") if name in batch]
    return batch | {n: batch[n].astype(jnp.float32) / 127.5 - 1 for n in names}
