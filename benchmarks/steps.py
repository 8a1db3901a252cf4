"""Whole training steps of the tasks, on random images.

They are the steps of `python -m train`, without a dataset and without the compilation
that the initializers of a network need.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.compile import NONE, Precision, abstract_dataset, make_config
from benchmarks.networks import make_values
from optax_tricks.nnx import split
from train.data import Dataset
from train.optim.optimizer import make_optimizer
from train.step import Trainable, TrainState, TrainStep, init_state, make_train_step
from train.tasks import TASKS
from train.tasks.base import Batch

# Of the learning rate schedule, whose first steps these are.
_TOTAL_STEPS, _STEPS_PER_EPOCH = 10_000, 100


def make_step(
    network: str,
    *,
    batch_size: int,
    precision: Precision = "float32",
    technique: str = NONE,
    grad_accum: int = 1,
) -> tuple[TrainStep, TrainState, Batch]:
    """Makes the training step of the task that a network is for.

    The images have the size that the network is for.

    Args:
      network: name of the network; in translation, of the generator.
      batch_size: images in a step.
      precision: precision of the computation; parameters are float32.
      technique: name of the technique, or `NONE`.
      grad_accum: parts of the batch whose gradients are added up.

    Returns:
      The step, which is not jitted, a state and a batch.
    """
    config = make_config(
        network, technique=technique, batch_size=batch_size, precision=precision
    )
    dataset = abstract_dataset(network)
    task = TASKS[config.task].create(config, dataset)
    key = jax.random.key(0)
    trainables = {}
    for name, model in nnx.eval_shape(
        lambda: task.create_networks(nnx.Rngs(0))
    ).items():
        optimizer = task.optimizer_config(name)
        tx = make_optimizer(
            optimizer,
            total_steps=_TOTAL_STEPS,
            steps_per_epoch=_STEPS_PER_EPOCH,
            key=key,
        )
        trainables[name] = Trainable(split(model)[0], tx, optimizer.logged)

    def first_state() -> TrainState:
        return init_state(task.create_networks(nnx.Rngs(0)), trainables, key)

    state = make_values(jax.eval_shape(first_state))
    # Those of an optimizer are not arbitrary: second moments, for one, are positive.
    opt_state = {
        name: jax.jit(trainable.tx.init)(state.params[name])
        for name, trainable in trainables.items()
    }
    step = make_train_step(task, trainables, grad_accum_steps=grad_accum)
    return step, state._replace(opt_state=opt_state), _batch(dataset, batch_size)


def _batch(dataset: Dataset, batch_size: int) -> Batch:
    """Returns random examples, as they are stored."""
    random = np.random.default_rng(0)
    reader = dataset.split("train").reader

    def examples(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        is_image = reader.fields[name].kind == "image"
        high = 256 if is_image else dataset.num_classes
        return jnp.asarray(random.integers(high, size=(batch_size, *shape)), dtype)

    return {name: examples(name, *spec) for name, spec in reader.spec.items()}
