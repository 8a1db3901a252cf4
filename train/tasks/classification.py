"""Classification: one label per image, cross-entropy, accuracy."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import models
from train.data import augment
from train.data.augment import Augmentation
from train.data.config import DataConfig
from train.errors import UsageError
from train.loop import Metrics, Program, make_program
from train.optimizers import OptimizerConfig
from train.progress import Progress, silent

NAME = "classification"
METRIC = "accuracy"

ModelName = tyro.extras.literal_type_from_choices(models.names(task=NAME))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Train a network to tell the classes of images."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataConfig
    )
    model: ModelName = "resnet8"
    """Network to train."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 100
    """Images in a step."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = (
        dataclasses.field(default_factory=OptimizerConfig)
    )

    def __post_init__(self) -> None:
        models.describe(self.model)
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """The task, for images of one form.

    Attributes:
      model: name of the network.
      num_classes: classes to tell.
      image_shape: (height, width, channels) of the images.
      augment: random changes of training images, and their normalisation.
      normalize: normalisation alone.
    """

    model: str
    num_classes: int
    image_shape: tuple[int, int, int]
    augment: Augmentation
    normalize: Augmentation

    def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A network for these images and classes."""
        height, width, channels = self.image_shape
        options = {"num_classes": self.num_classes, "in_channels": channels}
        if "image_size" in models.describe(self.model).options:
            # What is not square gets a clear refusal from the network's own check.
            options["image_size"] = min(height, width)
        return models.create(self.model, rngs=rngs, **options)

    def prepare(self, batch: Any, key: jax.Array) -> Any:
        """Augments and normalises images."""
        return self.augment(key, batch)

    def loss(self, model: nnx.Module, batch: Any) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy, and accuracy, of a prepared batch."""
        logits, labels = model(batch["image"]), batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return losses.mean(), {"accuracy": (correct.sum(), jnp.float32(labels.size))}

    def evaluate(self, model: nnx.Module, batch: Any) -> Metrics:
        """Loss and accuracy of stored images."""
        weight, labels = batch["weight"], batch["label"]
        logits = model(self.normalize(jax.random.key(0), batch)["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        count = weight.sum()
        return {
            "loss": ((losses * weight).sum(), count),
            "accuracy": ((correct * weight).sum(), count),
        }


def build(config: ClassificationConfig, progress: Progress = silent) -> Program:
    """Loads the data and compiles the run that a config describes."""
    dataset = config.data.load(NAME, progress)
    if dataset.num_classes < 2:
        raise UsageError(f"{dataset.name} has one class only: there is nothing to tell")
    train, test = config.data.open(dataset, progress)
    task = Classification(
        model=config.model,
        num_classes=dataset.num_classes,
        image_shape=(*dataset.split("train").reader.size, len(dataset.mean)),
        augment=config.data.augmentation(dataset),
        normalize=augment.normalize(dataset.mean, dataset.std),
    )
    try:
        with progress("compiling", 1):
            return make_program(
                task,
                config.optimizer,
                train=train,
                test=test,
                batch_size=config.batch_size,
                epochs=config.epochs,
            )
    except models.ImageShapeError as error:
        raise UsageError(
            f"{config.model} cannot take these images: {error} "
            "(--image-size brings them to another)"
        ) from error
