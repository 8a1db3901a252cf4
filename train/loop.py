"""The training loop that all tasks share; it knows none of them.

Data lie on the device. One jitted call gathers a batch, trains on it and returns the
next state, so that nothing but the call itself happens on the host in a step.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.errors import UsageError
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
      step: (state, data, order) -> (state, scalars); the state is donated.
      evaluate: state -> metrics over the whole evaluation split.
      data: the training split on the device.
      batch_size: examples in a step.
      schedule: the learning rate over steps.
      compile_seconds: time to trace and compile the step.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Tree, jax.Array], tuple[TrainState, Scalars]]
    evaluate: Callable[[TrainState], Record]
    data: Tree
    batch_size: int
    schedule: optax.Schedule
    compile_seconds: float

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split; what remains is left to other epochs."""
        return _num_examples(self.data) // self.batch_size


def make_program(
    task: Task,
    config: OptimizerConfig,
    *,
    train: Tree,
    test: Tree,
    batch_size: int,
    epochs: int,
) -> Program:
    """Builds and compiles a run.

    Args:
      task: what is trained.
      config: by what it is trained.
      train: arrays of training examples, of equal length.
      test: arrays of evaluation examples, of equal length.
      batch_size: examples in a step.
      epochs: passes over the training examples, for the schedule.

    Raises:
      UsageError: if a batch is larger than the training split.
    """
    num_train = _num_examples(train)
    if not 0 < batch_size <= num_train:
        raise UsageError(
            f"batch size {batch_size} must be from 1 to the {num_train} training "
            "examples"
        )
    total_steps = epochs * (num_train // batch_size)
    train, test = jax.device_put((train, test))
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
    def step(
        state: TrainState, data: Tree, order: jax.Array
    ) -> tuple[TrainState, Scalars]:
        rows = order[state.step % order.shape[0]]
        return train_step(state, jax.tree.map(lambda x: x[rows], data))

    start = time.perf_counter()
    abstract_state = jax.eval_shape(init, jax.random.key(0))
    abstract_order = jax.eval_shape(
        lambda: epoch_order(jax.random.key(0), 0, num_train, batch_size)
    )
    compiled = step.lower(abstract_state, train, abstract_order).compile()
    return Program(
        init=init,
        step=compiled,
        evaluate=functools.partial(_evaluate, _make_eval_step(task, graphdef), test),
        data=train,
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
    order_key = _split_keys(key).order
    num_train, steps = _num_examples(program.data), program.steps_per_epoch
    for epoch in range(1, epochs + 1):
        order = epoch_order(order_key, epoch, num_train, program.batch_size)
        jax.block_until_ready(order)
        start, logged = time.perf_counter(), []
        for flight in _flights(steps):
            for _ in range(flight):
                state, scalars = program.step(state, program.data, order)
                logged.append(scalars)
            jax.block_until_ready(logged[-1])
            on_steps(flight)
        seconds = time.perf_counter() - start
        on_epoch(
            _epoch_record(jax.device_get(logged), epoch, program.schedule)
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


@functools.partial(jax.jit, static_argnums=(2, 3))
def epoch_order(
    key: jax.Array, epoch: int, num_examples: int, batch_size: int
) -> jax.Array:
    """A random order of examples for an epoch, int32 (steps, batch_size)."""
    steps = num_examples // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def _flights(steps: int) -> Iterator[int]:
    for start in range(0, steps, _STEPS_IN_FLIGHT):
        yield min(_STEPS_IN_FLIGHT, steps - start)


def _epoch_record(
    logged: list[Scalars], epoch: int, schedule: optax.Schedule
) -> Record:
    first_step = (epoch - 1) * len(logged)
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


def _make_eval_step(task: Task, graphdef: nnx.GraphDef) -> Callable[..., Metrics]:
    @jax.jit
    def eval_step(params: Tree, model_state: Tree, data: Tree, rows: jax.Array):
        model = nnx.view(
            nnx.merge(graphdef, params, model_state, copy=True),
            raise_if_not_found=False,  # a network may have neither
            deterministic=True,
            use_running_average=True,
        )
        # Rows below 0 only fill up the last batch.
        batch = jax.tree.map(lambda x: x[rows], data)
        return task.evaluate(model, batch | {"weight": (rows >= 0).astype(jnp.float32)})

    return eval_step


def _evaluate(
    eval_step: Callable[..., Metrics], data: Tree, state: TrainState, batch_size=1024
) -> Record:
    num_examples = _num_examples(data)
    batch_size = min(batch_size, num_examples)
    num_batches = math.ceil(num_examples / batch_size)
    rows = np.full(num_batches * batch_size, -1, np.int32)
    rows[:num_examples] = np.arange(num_examples)
    totals = [
        eval_step(state.params, state.model_state, data, batch_rows)
        for batch_rows in rows.reshape(num_batches, batch_size)
    ]
    sums = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(totals))
    return {f"test_{name}": total / count for name, (total, count) in sums.items()}


def _num_examples(data: Tree) -> int:
    return len(jax.tree.leaves(data)[0])
