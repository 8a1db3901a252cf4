"""The training loop that all tasks share; it knows none of them.

An input feeds the step (`train.data.inputs`). One jitted call makes the batch, trains
on it and returns the next state, so that with data on the device nothing but the call
itself happens on the host in a step.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.data.inputs import Input, Sequential, Shuffled
from train.gradients import batch_gradients, split
from train.optimizers import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    trick_scalars,
)

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name: (sum, count)
Record = dict[str, float]

# Steps that may be in flight: many more deadlock on simulated CPU devices, and a
# progress bar would run ahead of the work.
_STEPS_IN_FLIGHT = 32

# Evaluation keeps nothing for a backward pass.
_EVALUATION_FACTOR = 4


class Task(Protocol):
    """What the loop asks of a task. A batch is a dict of arrays."""

    def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A model with fresh parameters."""

    def prepare(self, batch: Tree, key: jax.Array) -> Tree:
        """Turns stored examples into a training batch; runs inside the step."""

    def loss(self, model: nnx.Module, batch: Tree) -> tuple[jax.Array, Metrics]:
        """The mean loss over a prepared batch, and metrics."""

    def evaluate(self, model: nnx.Module, batch: Tree) -> Metrics:
        """Metrics of stored examples, each counted by its `batch["weight"]`."""


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Tree
    model_state: Tree
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


class Scalars(NamedTuple):
    """What a step gives to log.

    Attributes:
      mean: what an epoch's record averages over its steps, the loss among them.
      last: what it takes from its last step.
    """

    mean: dict[str, jax.Array]
    last: dict[str, jax.Array]


class NonFiniteLossError(ArithmeticError):
    """The loss stopped being a number."""

    def __init__(self, step: int, epoch: int):
        super().__init__(
            f"the loss is not finite at step {step} (epoch {epoch}): lower the "
            "learning rate, or clip the gradient"
        )
        self.step = step


class Program(NamedTuple):
    """A run compiled, to be trained from any number of seeds.

    Attributes:
      init: key -> the first state.
      step: (state, feed) -> (state, scalars); the state is donated.
      evaluate: state -> metrics over the whole evaluation split.
      feeds: (key, first step) -> what each step takes, without end.
      steps_before: number of steps in the first epochs.
      batch_size: examples in a step.
      schedule: the learning rate over steps.
      compile_seconds: time to trace and compile the step.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Tree], tuple[TrainState, Scalars]]
    evaluate: Callable[[TrainState], Record]
    feeds: Callable[[jax.Array, int], Iterator[Tree]]
    steps_before: Callable[[int], int]
    batch_size: int
    schedule: optax.Schedule
    compile_seconds: float


def make_program(
    task: Task,
    config: OptimizerConfig,
    *,
    train: Input,
    test: Input,
    batch_size: int,
    epochs: int,
) -> Program:
    """Builds and compiles a run.

    Args:
      task: what is trained.
      config: by what it is trained.
      train: training examples.
      test: evaluation examples.
      batch_size: examples in a step.
      epochs: passes over the training examples, for the schedule.

    Raises:
      UsageError: if a batch is larger than the training split.
    """

    def order_of(key: jax.Array) -> Shuffled:
        seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
        return Shuffled(seed, train.num_examples, batch_size)

    order = order_of(jax.random.key(0))  # its steps are those of every key
    total_steps = order.steps_before(epochs)
    # The definition is the same for every key and holds no arrays.
    graphdef, _, _ = split(nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0))))

    # Not jitted: run by itself it compiles small pieces that all runs share.
    def init(key: jax.Array) -> TrainState:
        keys = _split_keys(key)
        _, params, model_state = split(task.create_model(nnx.Rngs(keys.model)))
        tx = make_optimizer(config, total_steps, keys.trick)
        opt_state = tx.init(params)
        return TrainState(params, model_state, opt_state, jnp.int32(0), keys.steps)

    # The key of a random trick is read by `init` only.
    tx = make_optimizer(config, total_steps, jax.random.key(0))
    train_step = make_train_step(task, graphdef, tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, feed: Tree) -> tuple[TrainState, Scalars]:
        return train_step(state, train.batch(feed, state.step))

    start = time.perf_counter()
    abstract_state = jax.eval_shape(init, jax.random.key(0))
    compiled = step.lower(abstract_state, train.feed_shapes(order)).compile()
    return Program(
        init=init,
        step=compiled,
        evaluate=_make_evaluate(task, graphdef, test, _EVALUATION_FACTOR * batch_size),
        feeds=lambda key, first_step: train.feeds(order_of(key), first_step),
        steps_before=order.steps_before,
        batch_size=batch_size,
        schedule=make_schedule(config, total_steps),
        compile_seconds=time.perf_counter() - start,
    )


def make_train_step(
    task: Task, graphdef: nnx.GraphDef, tx: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Tree], tuple[TrainState, Scalars]]:
    """The pure function (state, batch) -> (state, scalars to log)."""

    def train_step(state: TrainState, batch: Tree) -> tuple[TrainState, Scalars]:
        batch = task.prepare(batch, jax.random.fold_in(state.key, state.step))
        out = batch_gradients(
            task.loss, graphdef, state.params, state.model_state, batch
        )
        updates, opt_state = tx.update(
            out.grads, state.opt_state, state.params, grad_fn=out.grad_fn
        )
        params = optax.apply_updates(state.params, updates)
        ratios = {name: total / count for name, (total, count) in out.aux.items()}
        norms = {
            "gradient_norm": optax.tree.norm(out.grads),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
        }
        scalars = Scalars(
            mean={"loss": out.loss, **ratios}, last=norms | trick_scalars(opt_state)
        )
        next_state = TrainState(
            params, out.model_state, opt_state, state.step + 1, state.key
        )
        return next_state, scalars

    return train_step


def fit(
    program: Program,
    key: jax.Array,
    epochs: int,
    *,
    on_epoch: Callable[[Record], None],
    on_steps: Callable[[int], None] = lambda steps: None,
) -> TrainState:
    """Trains from one key.

    Args:
      program: the compiled run.
      key: decides parameters, order of examples and random tricks.
      epochs: passes over the training examples.
      on_epoch: called after each epoch with a record: the mean training loss and
        metrics of the epoch, the last step's other scalars, the evaluation metrics,
        learning rate, epoch, step, and the seconds of its steps.
      on_steps: called now and then with the number of steps done since.

    Returns:
      The last state.

    Raises:
      NonFiniteLossError: after the epoch in which the loss became NaN or infinite.
    """
    state = program.init(key)
    with contextlib.closing(program.feeds(_split_keys(key).order, 0)) as feeds:
        flight = 1
        for epoch in range(1, epochs + 1):
            first_step = program.steps_before(epoch - 1)
            start, logged = time.perf_counter(), []
            steps = program.steps_before(epoch) - first_step
            while len(logged) < steps:
                launched = time.perf_counter()
                flight = min(flight, steps - len(logged))
                for _ in range(flight):
                    state, scalars = program.step(state, next(feeds))
                    logged.append(scalars)
                jax.block_until_ready(logged[-1])
                on_steps(flight)
                flight = _next_flight(flight, time.perf_counter() - launched)
            seconds = time.perf_counter() - start
            logged = jax.device_get(logged)
            on_epoch(
                _epoch_record(logged, epoch, first_step, program.schedule)
                | program.evaluate(state)
                | {"seconds": seconds}
            )
    return state


class _Keys(NamedTuple):
    """What the key of a run is split into, in one place so that none is used twice."""

    model: jax.Array
    order: jax.Array
    trick: jax.Array
    steps: jax.Array


def _split_keys(key: jax.Array) -> _Keys:
    model_key, order_key, rest = jax.random.split(key, 3)
    return _Keys(model_key, order_key, *jax.random.split(rest))


def _next_flight(flight: int, seconds: float) -> int:
    """As many steps as take a second, so that progress is seen to move."""
    return max(1, min(_STEPS_IN_FLIGHT, 2 * flight, int(flight / seconds)))


def _epoch_record(
    logged: list[Scalars], epoch: int, first_step: int, schedule: optax.Schedule
) -> Record:
    for i, scalars in enumerate(logged):
        if not math.isfinite(scalars.mean["loss"]):
            raise NonFiniteLossError(first_step + i, epoch)
    if not math.isfinite(logged[-1].last["parameter_norm"]):
        raise NonFiniteLossError(first_step + len(logged), epoch)
    means = jax.tree.map(lambda *x: np.mean(x), *(s.mean for s in logged))
    return {
        "epoch": epoch,
        "step": first_step + len(logged),
        "learning_rate": float(schedule(first_step + len(logged) - 1)),
        **{f"train_{k}": float(v) for k, v in (means | logged[-1].last).items()},
    }


def _make_evaluate(
    task: Task, graphdef: nnx.GraphDef, test: Input, batch_size: int
) -> Callable[[TrainState], Record]:
    order = Sequential(test.num_examples, min(batch_size, test.num_examples))
    steps = zip(itertools.count(), test.feeds(order))  # goes on where it stopped

    @jax.jit
    def eval_step(params: Tree, model_state: Tree, feed: Tree, step: int) -> Metrics:
        model = nnx.view(
            nnx.merge(graphdef, params, model_state, copy=True),
            raise_if_not_found=False,  # a network may have neither
            deterministic=True,
            use_running_average=True,
        )
        return task.evaluate(model, test.batch(feed, step))

    def evaluate(state: TrainState) -> Record:
        totals = [
            eval_step(state.params, state.model_state, feed, step)
            for step, feed in itertools.islice(steps, order.steps_before(1))
        ]
        sums = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(totals))
        return {f"test_{name}": total / count for name, (total, count) in sums.items()}

    return evaluate
