"""A compiled run: the jitted step and the evaluation, for any seed.

A loader feeds the step (`train.data.loaders`). One jitted call makes the batch, trains
on it and returns the next state. With data on the device, a step moves nothing between
host and device.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from optax_tricks.nnx import split
from train.config import TrainingConfig
from train.data import Dataset
from train.data.loaders import Loader
from train.data.samplers import RandomSampler, SequentialSampler
from train.errors import UsageError, see
from train.optim.optimizer import learning_rate, make_optimizer
from train.parallel import make_mesh, put, replicated, state_shardings
from train.progress import Progress, silent
from train.step import (
    EpochLog,
    StepMetrics,
    Trainable,
    TrainState,
    Tree,
    add_to_log,
    empty_log,
    eval_networks,
    eval_params,
    init_state,
    make_train_step,
    without_log,
)
from train.tasks import Task, open_task
from train.tasks.base import Networks, Sums

# More steps in flight deadlock on simulated CPU devices, and let a progress bar run
# ahead of the work.
STEPS_IN_FLIGHT = 32

# An evaluation batch is larger, as nothing is kept for a backward pass.
_EVAL_BATCH_FACTOR = 4


class Plan:
    """A run before it is compiled; the devices of its mesh need not be there.

    Attributes:
      task: the task that is trained.
      config: the settings of the run.
      mesh: the devices.
      graphdefs: the definition of each network.
      schedules: the learning rate schedule of each network.
      abstract_state: shapes, dtypes and shardings of a state.
      abstract_feed: shapes, dtypes and shardings of the input of a step.
      step: the jitted step (state, feed) -> state; it donates the state.
      steps_before: a function that returns the number of steps before an epoch; the
        first epoch is 0.
    """

    def __init__(
        self, task: Task, config: TrainingConfig, *, train_loader: Loader, mesh: Mesh
    ):
        """Makes the step.

        Args:
          task: the task to train.
          config: the settings of the run.
          train_loader: loads training examples onto the devices of the mesh.
          mesh: the devices.

        Raises:
          UsageError: if a batch is larger than the training split, or cannot be shared
            by the devices.
        """
        _check_batch(config, mesh)
        self.task = task
        self.config = config
        self._train_loader = train_loader
        self.mesh = mesh
        sampler = self._sampler(0)
        self.steps_before = sampler.steps_before
        networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
        # Seeds share the graph definitions. Their optimizers differ only in the key of
        # the initial state.
        trainables = self._trainables(networks, jax.random.key(0))
        self.graphdefs = {name: t.graphdef for name, t in trainables.items()}
        self.schedules = {
            name: learning_rate(task.optimizer_config(name), **self._lengths)
            for name in trainables
        }
        train_step = make_train_step(
            task,
            trainables,
            grad_accum_steps=config.grad_accum,
            ema_decay=config.ema,
        )

        # Traced once: for the names of the metrics, and for the step that logs them.
        @functools.partial(jax.jit, inline=True)
        def step(state: TrainState, feed: Any) -> tuple[TrainState, StepMetrics]:
            return train_step(state, self._batch(train_loader, feed, state.step))

        def step_and_log(state: TrainState, feed: Any) -> TrainState:
            after, metrics = step(without_log(state), feed)
            return after._replace(log=add_to_log(state.log, metrics, state.step))

        self.abstract_feed = train_loader.abstract_feed(sampler)
        self.abstract_state = self._abstract_state(networks, trainables, step)
        self._shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self.step = jax.jit(
            step_and_log, donate_argnums=0, out_shardings=self._shardings
        )

    @property
    def _lengths(self) -> dict[str, int]:
        return {
            "total_steps": self.steps_before(self.config.epochs),
            "steps_per_epoch": self.steps_before(1),
        }

    def _trainables(
        self, networks: Networks, key: Key[Array, ""]
    ) -> dict[str, Trainable]:
        trainables = {}
        for i, (name, network) in enumerate(networks.items()):
            config = self.task.optimizer_config(name)
            tx = make_optimizer(
                config,
                **self._lengths,
                key=jax.random.fold_in(key, i) if i else key,
                head=network.head_paths,
            )
            trainables[name] = Trainable(split(network)[0], tx, config.logged)
        return trainables

    def _sampler(self, seed: int) -> RandomSampler:
        """Returns the order of the training examples."""
        data = jax.random.key_data(_split_key(seed).order)
        return RandomSampler(
            tuple(data.tolist()),
            self._train_loader.num_examples,
            self.config.batch_size,
        )

    def _abstract_state(
        self,
        networks: Networks,
        trainables: dict[str, Trainable],
        step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]],
    ) -> TrainState:
        def first_state(arrays: dict[str, tuple[Tree, Tree]]) -> TrainState:
            return init_state(
                {n: nnx.merge(t.graphdef, *arrays[n]) for n, t in trainables.items()},
                trainables,
                jax.random.key(0),
                ema_decay=self.config.ema,
            )

        arrays = {name: split(network)[1:] for name, network in networks.items()}
        state: TrainState = self._sharded(jax.eval_shape(first_state, arrays))
        _, metrics = jax.eval_shape(step, state, self.abstract_feed)
        # A log has scalars alone, so every device has it whole.
        return state._replace(log=self._sharded(jax.eval_shape(empty_log, metrics)))

    def _sharded(self, tree: Tree) -> Tree:
        """Returns shapes and dtypes with the shardings that they have in a state."""
        shardings = state_shardings(
            tree, self.mesh, shard_params=self.config.shard_params
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    def _batch(self, loader: Loader, feed: Any, step: jax.Array) -> Any:
        """Makes a batch, of which each device computes its part."""
        sharding = NamedSharding(self.mesh, P("data"))
        return jax.lax.with_sharding_constraint(loader.batch(feed, step), sharding)


class Program(Plan):
    """A compiled run, which trains and evaluates from any seed.

    Attributes:
      train_step: the compiled step (state, feed) -> state; it donates the state.
      compile_seconds: time that it took to trace and compile the step, in seconds.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        *,
        train_loader: Loader,
        eval_loader: Loader,
        mesh: Mesh,
    ):
        """Compiles the step.

        Args:
          task: the task to train.
          config: the settings of the run.
          train_loader: loads training examples onto the devices of the mesh.
          eval_loader: loads evaluation examples onto the devices of the mesh.
          mesh: the devices.

        Raises:
          UsageError: if a batch is larger than the training split, or cannot be shared
            by the devices.
        """
        start = time.perf_counter()
        super().__init__(task, config, train_loader=train_loader, mesh=mesh)
        self._eval_loader = eval_loader
        self.train_step = self.step.lower(
            self.abstract_state, self.abstract_feed
        ).compile()
        self._empty_log = jax.jit(self._new_log, out_shardings=self._shardings.log)
        self._evaluate = self._make_evaluation()
        self.compile_seconds = time.perf_counter() - start

    def init_state(
        self, seed: int, show: Callable[[str], None] = lambda _: None
    ) -> TrainState:
        """Returns the state before the first step.

        Args:
          seed: determines the parameters, and the keys of all that is random.
          show: called with a line about pretrained weights, if there are any.
        """
        # Not jitted: operation by operation, it compiles programs that all runs share.
        keys = _split_key(seed)
        networks = self.task.create_networks(nnx.Rngs(keys.params))
        if about_weights := self.task.load_weights(networks):
            show(about_weights)
        trainables = self._trainables(networks, keys.techniques)
        state = init_state(
            networks, trainables, keys.augmentation, ema_decay=self.config.ema
        )
        return put(state._replace(log=self._new_log()), self._shardings)

    def names_of(self, metric: str) -> tuple[str, ...]:
        """Returns the names of a metric in the records.

        If there are several networks, the training metric of each begins with the name
        of the network. The last name is the metric itself, for scores of evaluations.
        """
        several = self.graphdefs if len(self.graphdefs) > 1 else ()
        return (*(f"{name}_{metric}" for name in several), metric)

    def clear_log(self, state: TrainState) -> TrainState:
        """Returns the state with an empty log, for a new epoch."""
        return state._replace(log=self._empty_log())

    def feeds(self, seed: int, first_step: int = 0) -> Generator[Any]:
        """Yields the input of each step, from `first_step` on and without end."""
        return self._train_loader.feeds(self._sampler(seed), first_step)

    def evaluate(self, state: TrainState) -> Sums:
        """Returns the sums of the task over the evaluation split, as NumPy arrays.

        Integers are added up in int64 and floats in float64, so no count is too large.
        """
        return self._evaluate(eval_params(state))

    def predict(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Returns the predictions of the task.

        Args:
          state: the state, whose average is used if there is one.
          images: stored images, uint8 (batch, height, width, channels).
        """

        @jax.jit
        def predict(params: Tree, images: jax.Array) -> jax.Array:
            return self.task.predict(self._networks(params), images)

        # Every process predicts with all parameters.
        whole = jax.jit(lambda x: x, out_shardings=replicated(self.mesh))
        params = jax.device_get(whole(eval_params(state)))
        return np.asarray(predict(params, images))

    def _networks(self, params: tuple[Tree, Tree]) -> Networks:
        return eval_networks(self.graphdefs, *params)

    def _new_log(self) -> EpochLog:
        shapes = self.abstract_state.log
        log: EpochLog = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return log._replace(bad_step=log.bad_step - 1)

    def _make_evaluation(self) -> Callable[[Tree], Sums]:
        loader, num_shards = self._eval_loader, self.mesh.shape["data"]
        most = min(_EVAL_BATCH_FACTOR * self.config.batch_size, loader.num_examples)
        batch_size = num_shards * math.ceil(most / num_shards)
        sampler = SequentialSampler(loader.num_examples, batch_size)
        # The feeds do not end: each evaluation takes one epoch of them.
        feeds = zip(itertools.count(), loader.feeds(sampler))

        def evaluate_batch(params: Tree, feed: Any, step: jax.Array) -> Sums:
            batch = self._batch(loader, feed, step)
            networks = self._networks(params)
            return self.task.evaluate(networks, batch, sampler.weights(step))

        everywhere = replicated(self.mesh)
        sums_of: Callable[..., Sums] = jax.jit(evaluate_batch, out_shardings=everywhere)

        def evaluate(params: Tree) -> Sums:
            total: Sums = {}
            in_flight: list[Sums] = []
            for step, feed in itertools.islice(feeds, sampler.steps_before(1)):
                in_flight.append(sums_of(params, feed, step))
                if len(in_flight) == STEPS_IN_FLIGHT:
                    total, in_flight = _add_on_host(total, in_flight), []
            return _add_on_host(total, in_flight)

        return evaluate


def _add_on_host(total: Sums, batches: Sequence[Sums]) -> Sums:
    """Adds the sums of some batches to a total, in int64 and float64."""
    for sums in jax.device_get(batches):
        wide = {
            name: x.astype(np.int64 if jnp.issubdtype(x.dtype, jnp.integer) else float)
            for name, x in sums.items()
        }
        total = {name: total.get(name, 0) + x for name, x in wide.items()}
    return total


def open_program(
    config: TrainingConfig, progress: Progress = silent
) -> tuple[Program, Dataset]:
    """Loads the data and compiles the run that a config describes.

    Returns:
      The compiled run and its dataset.

    Raises:
      UsageError: if the config does not fit the data or the devices.
    """
    task, dataset = open_task(config, progress)
    return compile_program(task, config, dataset, progress), dataset


def compile_program(
    task: Task, config: TrainingConfig, dataset: Dataset, progress: Progress = silent
) -> Program:
    """Compiles a run on all devices.

    Raises:
      UsageError: if the config does not fit the data or the devices.
    """
    mesh = make_mesh()
    train_loader, eval_loader = config.data.open(dataset, mesh, progress)
    with progress("compiling", 1):
        return Program(
            task, config, train_loader=train_loader, eval_loader=eval_loader, mesh=mesh
        )


def _check_batch(config: TrainingConfig, mesh: Mesh) -> None:
    num_shards = mesh.shape["data"]
    divisor = num_shards * config.grad_accum
    if config.batch_size % divisor:
        raise UsageError(
            f"batch_size {config.batch_size} must be a multiple of {divisor}, the "
            f"devices ({num_shards}) times grad_accum ({config.grad_accum})"
            + see("machines.md#one-run-on-all-of-them")
        )


class _Keys(NamedTuple):
    """The keys of a run, split in one place so that none is used twice."""

    params: jax.Array
    order: jax.Array
    techniques: jax.Array
    augmentation: jax.Array


def _split_key(seed: int) -> _Keys:
    params, order, rest = jax.random.split(jax.random.key(seed), 3)
    return _Keys(params, order, *jax.random.split(rest))
