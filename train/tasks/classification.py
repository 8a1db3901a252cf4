"""Classification: one label per image, cross-entropy, accuracy."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import models
from train import data
from train.loop import Metrics, Program, make_program
from train.optimizers import OptimizerConfig

NAME = "classification"
METRIC = "accuracy"

DatasetName = tyro.extras.literal_type_from_choices(data.names())
ModelName = tyro.extras.literal_type_from_choices(models.names())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Train a network to tell the classes of images."""

    dataset: DatasetName = "digits"
    """Images to train on; digits come with scikit-learn."""
    model: ModelName = "resnet8"
    """Network to train."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 100
    """Images in a step."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Validation holds out a fifth of the training images, to choose settings by."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(default_factory=OptimizerConfig)
    )

    def __post_init__(self) -> None:
        models.describe(self.model)
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """The task, for images of one form."""

    model: str
    num_classes: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A network for these images and classes."""
        return models.create(
            self.model,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            rngs=rngs,
        )

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        """Scales images to mean 0 and standard deviation 1 per channel."""
        del key  # digits have a top, a bottom and no room to shift: no augmentation
        images = batch["image"].astype(jnp.float32) / 255
        shape = (1, 1, 1, self.in_channels)
        mean = jnp.asarray(self.mean).reshape(shape)
        return batch | {"image": (images - mean) / jnp.asarray(self.std).reshape(shape)}

    def loss(self, model: nnx.Module, batch: Any) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy, and accuracy, of a prepared batch."""
        logits, labels = model(batch["image"]), batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return losses.mean(), {"accuracy": (correct.sum(), jnp.float32(labels.size))}

    def evaluate(self, model: nnx.Module, batch: Any) -> Metrics:
        """Loss and accuracy of stored images."""
        weight, labels = batch["weight"], batch["label"]
        logits = model(self.prepare(batch, jax.random.key(0))["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        count = weight.sum()
        return {
            "loss": ((losses * weight).sum(), count),
            "accuracy": ((correct * weight).sum(), count),
        }


def build(config: ClassificationConfig) -> Program:
    """Loads the data and compiles the run that a config describes."""
    dataset = data.load(config.dataset)
    if config.evaluate_on == "validation":
        dataset = dataset.hold_out()
    task = Classification(
        model=config.model,
        num_classes=dataset.num_classes,
        in_channels=dataset.train["image"].shape[-1],
        mean=dataset.mean,
        std=dataset.std,
    )
    return make_program(
        task,
        config.optimizer,
        train=dataset.train,
        test=dataset.test,
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
