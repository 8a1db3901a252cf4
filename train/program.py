"""A run compiled: the training step and the evaluation for data, devices and seeds.

An input feeds the step (`train.data.inputs`). One jitted call makes the batch, trains
on it and returns the next state, so that with data on the device nothing but the call
itself happens on the host in a step.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_tricks.nnx import split
from train.config import TrainingConfig
from train.data.inputs import Input, Order, Sequential, Shuffled, Together
from train.parallel import put, replicated, state_shardings
from train.errors import UsageError
from train.optimizers import make_optimizer, make_schedule
from train.step import (
    Log,
    Models,
    Network,
    Task,
    TrainState,
    TrainStep,
    Tree,
    add_to_log,
    empty_log,
    evaluation_models,
    make_train_step,
    new_state,
)

# Steps that may be in flight: many more deadlock on simulated CPU devices, and a
# progress bar would run ahead of the work.
STEPS_IN_FLIGHT = 32

# Evaluation keeps nothing for a backward pass.
_EVALUATION_FACTOR = 4


class Program:
    """A run compiled, to be trained from any seeds.

    Attributes:
      task: what is trained.
      config: how it is trained.
      width: seeds that are trained together, stacked in one state.
      steps_per_call: steps that one call of `train` takes at most.
      graphdefs: definitions of the networks, by name.
      schedules: the learning rate of each network over steps.
      abstract_state: shapes, dtypes and shardings of a state.
      compile_seconds: time to trace and compile the step.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        *,
        train: Input,
        test: Input,
        mesh: Mesh,
        width: int = 1,
        steps_per_call: int = 1,
    ):
        """Compiles the step.

        Args:
          task: what is trained.
          config: how it is trained.
          train: training examples, on the devices of the mesh.
          test: evaluation examples, on the devices of the mesh.
          mesh: the devices; `width` is a multiple of those along "seed".
          width: seeds that are trained together; more than one only of resident data.
          steps_per_call: more than one only of resident data.

        Raises:
          UsageError: if a batch is larger than the training split, or cannot be shared
            by the devices.
        """
        _check_batch(config, mesh)
        self.task = task
        self.config = config
        self.width = width
        self.steps_per_call = steps_per_call
        self._train, self._test, self._mesh = train, test, mesh
        start = time.perf_counter()
        order = self._order((0,) * width)
        self._lengths = {
            "total_steps": order.steps_before(config.epochs),
            "steps_per_epoch": order.steps_before(1),
        }
        self.steps_before = order.steps_before
        # Definitions are the same for every seed and hold no arrays. The key of a
        # random trick is read when its state is made only.
        models = nnx.eval_shape(lambda: task.create_models(nnx.Rngs(0)))
        networks = self._networks(models, jax.random.key(0))
        self.graphdefs = {name: network.graphdef for name, network in networks.items()}
        self.schedules = {
            name: make_schedule(task.optimizer_for(name), **self._lengths)
            for name in networks
        }
        step = make_train_step(
            task, networks, accumulate=config.accumulate, ema=config.ema
        )
        self.abstract_state = self._abstract_state(networks, step)
        self._shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self._compiled = self._compile(step, train.feed_shapes(order))
        self._empty_log = jax.jit(self._new_log, out_shardings=self._shardings.log)
        self._evaluation = self._make_evaluation()
        self.compile_seconds = time.perf_counter() - start

    def init(self, seeds: Sequence[int]) -> TrainState:
        """The state of a group before the first step."""
        # Not jitted: run by itself it compiles small pieces that all runs share.
        state = self._stack([self._init_one(seed) for seed in seeds])
        return put(state._replace(log=self._new_log()), self._shardings)

    def reset(self, state: TrainState) -> TrainState:
        """The state with the empty log of a new epoch."""
        return state._replace(log=self._empty_log())

    def train(self, state: TrainState, feed: Tree, steps: int) -> TrainState:
        """Takes up to `steps_per_call` steps from one feed; donates the state."""
        if self.steps_per_call == 1:
            return self._compiled(state, feed)
        count = put(np.int32(steps), replicated(self._mesh))
        return self._compiled(state, feed, count)

    def feeds(self, seeds: Sequence[int], first_step: int) -> Iterator[Tree]:
        """What each step of a group takes, without end, from a step on."""
        return self._train.feeds(self._order(seeds), first_step)

    def evaluate(self, state: TrainState) -> list[Tree]:
        """Totals over the evaluation split, for each seed of a group."""
        return of_each(self._evaluation(evaluated(state)), self.width)

    def networks(self, state: TrainState, place: int = 0) -> tuple[Tree, Tree]:
        """Parameters and other state to evaluate, on the host, of a seed of a group."""
        whole = jax.jit(lambda x: x, out_shardings=replicated(self._mesh))
        return of_each(whole(evaluated(state)), self.width)[place]

    def _networks(self, models: Models, key: jax.Array) -> dict[str, Network]:
        return {
            name: Network(
                split(model)[0],
                make_optimizer(
                    self.task.optimizer_for(name),
                    **self._lengths,
                    key=jax.random.fold_in(key, i) if i else key,
                    head=getattr(model, "HEAD", ()),
                ),
            )
            for i, (name, model) in enumerate(models.items())
        }

    def _init_one(self, seed: int) -> TrainState:
        keys = _split_keys(jax.random.key(seed))
        models = self.task.create_models(nnx.Rngs(keys.model))
        self.task.load(models)
        networks = self._networks(models, keys.trick)
        return new_state(models, networks, keys.steps, ema=self.config.ema)

    def _stack(self, states: Sequence[TrainState]) -> TrainState:
        if self.width == 1:
            return states[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def _order(self, seeds: Sequence[int]) -> Order:
        """The order of examples of a group."""
        orders = [
            Shuffled(
                tuple(
                    jax.random.key_data(_split_keys(jax.random.key(s)).order).tolist()
                ),
                self._train.num_examples,
                self.config.batch_size,
            )
            for s in seeds
        ]
        return orders[0] if self.width == 1 else Together(tuple(orders))

    def _abstract_state(
        self, networks: Mapping[str, Network], train_step: TrainStep
    ) -> TrainState:
        def one() -> TrainState:
            models = self.task.create_models(nnx.Rngs(0))
            key = jax.random.key(0)
            state = new_state(models, networks, key, ema=self.config.ema)
            batch = self._train.batch(self._one_feed(), state.step)
            _, scalars = train_step(state, batch)
            return state._replace(log=empty_log(scalars))

        state = jax.eval_shape(lambda: self._stack([one()] * self.width))
        shardings = state_shardings(
            state,
            self._mesh,
            stacked=self.width > 1,
            shard_parameters=self.config.shard_parameters,
        )
        # Every process reads the whole of these.
        whole = replicated(self._mesh)
        read = {"step": whole, "log": jax.tree.map(lambda _: whole, state.log)}
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            shardings._replace(**read),
        )

    def _one_feed(self) -> Tree:
        """Zeros in the form of what a step of one seed takes."""
        order = Shuffled((0,), self._train.num_examples, self.config.batch_size)
        shapes = self._train.feed_shapes(order)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _new_log(self) -> Log:
        shapes = self.abstract_state.log
        log = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return log._replace(bad_step=log.bad_step - 1)

    def _compile(self, train_step: TrainStep, feed: Tree) -> jax.stages.Compiled:
        def step(state: TrainState, feed: Tree) -> TrainState:
            batch = self._spread(self._train.batch(feed, state.step))
            after, scalars = train_step(state, batch)
            return after._replace(log=add_to_log(state.log, scalars, state.step))

        if self.width > 1:
            axes = (0, self._train.seeds_axes)
            step = jax.vmap(step, in_axes=axes, spmd_axis_name="seed")
        several = self.steps_per_call > 1

        def call(state: TrainState, feed: Tree, *count: jax.Array) -> TrainState:
            if not several:  # a loop of one step may be slower than the step
                return step(state, feed)
            return jax.lax.fori_loop(0, *count, lambda _, s: step(s, feed), state)

        counts = [jax.ShapeDtypeStruct((), jnp.int32)] if several else []
        jitted = jax.jit(call, donate_argnums=0, out_shardings=self._shardings)
        return jitted.lower(self.abstract_state, feed, *counts).compile()

    def _spread(self, batch: Tree) -> Tree:
        """Has each device compute its part of a batch."""
        sharding = NamedSharding(self._mesh, P("data"))
        return jax.lax.with_sharding_constraint(batch, sharding)

    def _make_evaluation(self) -> Callable[[Tree], Tree]:
        sharers = self._mesh.shape["data"]
        most = min(_EVALUATION_FACTOR * self.config.batch_size, self._test.num_examples)
        order = Sequential(self._test.num_examples, sharers * math.ceil(most / sharers))
        # Goes on where the last evaluation stopped, at the first example again.
        feeds = zip(itertools.count(), self._test.feeds(order))

        def totals(networks: Tree, feed: Tree, step: jax.Array) -> Tree:
            batch = self._spread(self._test.batch(feed, step))
            models = evaluation_models(self.graphdefs, *networks)
            return self.task.evaluate(models, batch)

        if self.width > 1:
            totals = jax.vmap(totals, in_axes=(0, None, None), spmd_axis_name="seed")
        everywhere = replicated(self._mesh)
        first = jax.jit(totals, out_shardings=everywhere)
        add = jax.jit(optax.tree.add, donate_argnums=0, out_shardings=everywhere)

        def evaluate(networks: Tree) -> Tree:
            total = None
            for step, feed in itertools.islice(feeds, order.steps_before(1)):
                found = first(networks, feed, step)
                total = found if total is None else add(total, found)
                if step % STEPS_IN_FLIGHT == 0:
                    jax.block_until_ready(total)
            return total

        return evaluate


def _check_batch(config: TrainingConfig, mesh: Mesh) -> None:
    sharers = mesh.shape["data"] * config.accumulate
    if config.batch_size % sharers:
        raise UsageError(
            f"batch size {config.batch_size} must be a multiple of {sharers}, the "
            f"devices ({mesh.shape['data']}) times --accumulate ({config.accumulate})"
        )


def evaluated(state: TrainState) -> tuple[Tree, Tree]:
    """Parameters and other state of the networks that are evaluated."""
    return state.average or (state.params, state.model_state)


class _Keys(NamedTuple):
    """What the key of a run is split into, in one place so that none is used twice."""

    model: jax.Array
    order: jax.Array
    trick: jax.Array
    steps: jax.Array


def _split_keys(key: jax.Array) -> _Keys:
    model_key, order_key, rest = jax.random.split(key, 3)
    return _Keys(model_key, order_key, *jax.random.split(rest))


def of_each(tree: Tree, width: int) -> list[Tree]:
    """A tree on the host, for each seed of a group."""
    tree = jax.device_get(tree)
    if width == 1:
        return [tree]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(width)]
