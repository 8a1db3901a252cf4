"""Small tasks that several tests train."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from tests.shared import one_device_mesh
from train.config import TrainingConfig
from train.data.loaders import InMemoryLoader
from train.optim.config import OptimizerConfig
from train.program import Program
from train.run import Callbacks, train_seed

ONE_DEVICE = one_device_mesh()


class Linear(nnx.Linear, models.Network):
    """A linear layer as a network."""


class Sequential(nnx.Sequential, models.Network):
    """Layers as a network."""


@dataclasses.dataclass
class Regression:
    """The smallest task there is; its loss is NaN where the kernel is steep."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    bad_weight: float = math.inf

    metric = "error"

    def create_networks(self, rngs):
        return {"model": Linear(2, 1, rngs=rngs)}

    def load_weights(self, networks):
        return ""

    def optimizer_config(self, name):
        return self.optimizer

    def prepare(self, batch, key):
        return batch

    def _losses(self, model, batch):
        return jnp.square(model(batch["x"])[:, 0] - batch["y"])

    def loss(self, name, networks, batch):
        losses = self._losses(networks[name], batch)
        total, count = losses.sum(), jnp.float32(losses.size)
        if not isinstance(networks[name], Linear):
            return (total, count), {}
        steep = jnp.abs(networks[name].kernel[...]).max() > self.bad_weight
        return (jnp.where(steep, jnp.nan, total), count), {}

    def evaluate(self, networks, batch, weights):
        errors = self._losses(networks["model"], batch) * weights
        return {"error": errors.sum(), "count": weights.sum()}

    def scores(self, sums):
        return {"error": sums["error"] / sums["count"]}


class Normalized(Regression):
    """A regression whose network has BatchNorm."""

    def create_networks(self, rngs):
        layers = nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        return {"model": Sequential(*layers, nnx.Linear(4, 1, rngs=rngs))}


class Rivals(Regression):
    """Two networks: the first fits the targets, the second fits the first."""

    def create_networks(self, rngs):
        return {name: Linear(2, 1, rngs=rngs) for name in ("first", "second")}

    def loss(self, name, networks, batch):
        first, second = (network(batch["x"])[:, 0] for network in networks.values())
        losses = jnp.square(first - batch["y"] if name == "first" else second - first)
        return (losses.sum(), jnp.float32(losses.size)), {}

    def evaluate(self, networks, batch, weights):
        (total, count), _ = self.loss("second", networks, batch)
        return {"error": total, "count": count}


def make_data(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([2.0, -1.0])}


def make_program(
    task=None, *, num_train=30, num_test=10, mesh=ONE_DEVICE, config=None, **optimizer
):
    """Compiles a task, with settings of the run and of its optimizer."""
    task = task or Regression()
    task.optimizer = OptimizerConfig(**{"weight_decay": 0.0} | optimizer)
    config = {"epochs": 3, "batch_size": 8} | (config or {})
    return Program(
        task,
        TrainingConfig(optimizer=task.optimizer, **config),
        train_loader=InMemoryLoader(make_data(num_train), mesh),
        eval_loader=InMemoryLoader(make_data(num_test, seed=1), mesh),
        mesh=mesh,
    )


class Recorder(Callbacks):
    """Keeps what the loop reports.

    Attributes:
      epochs: records of epochs.
      steps: records of steps.
      counts: steps between two reports.
    """

    def __init__(self):
        self.epochs, self.steps, self.counts = [], [], []

    def on_steps(self, state, count, seconds):
        self.counts.append(count)

    def on_log(self, record):
        self.steps.append(record)

    def on_epoch(self, state, record):
        self.epochs.append(record)


def train(program, seed=0, **resumed):
    """Returns records of epochs and steps without times, and the last state."""
    recorder = Recorder()
    state, _ = train_seed(program, seed, recorder, **resumed)
    return without_seconds(recorder.epochs), recorder.steps, state


def without_seconds(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def one_step(program, seed=0):
    """Returns the state after the first step."""
    state = program.init_state(seed)
    return program.train_step(state, next(program.feeds(seed)))


def error_of(program, state):
    return program.task.scores(program.evaluate(state))["error"]


def without_keys(tree):
    """Replaces PRNG keys by their data."""

    def data(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)
