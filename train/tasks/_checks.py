"""What tasks check before anything is trained."""

import jax
from flax import nnx

import models
from train.data import Dataset
from train.errors import UsageError
from train.step import Task


def check_images(task: Task, dataset: Dataset) -> None:
    """Traces the losses of one training example, which costs no arithmetic.

    Raises:
      UsageError: if a network cannot take images of this shape.
    """
    batch = {
        name: jax.ShapeDtypeStruct((1, *shape), dtype)
        for name, (shape, dtype) in dataset.split("train").reader.spec.items()
    }

    def losses(batch):
        networks = task.create_models(nnx.Rngs(0))
        batch = task.prepare(batch, jax.random.key(0))
        return [task.loss(name, networks, batch)[0] for name in networks]

    try:
        jax.eval_shape(losses, batch)
    except models.ImageShapeError as error:
        raise UsageError(
            f"the network cannot take these images: {error} (--image-size brings all "
            "to another, --crop cuts those to train on)"
        ) from error
