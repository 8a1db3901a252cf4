"""The training step: the state of a run, and the pure function that advances it."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

import models
import optax_tricks
from optax_tricks.nnx import batch_gradients, split
from train.tasks.base import Batch, Metrics, Networks, SumAndCount, Task

Tree = Any
Scalar: TypeAlias = Float[Array, ""]
Record: TypeAlias = dict[str, float]


class EpochLog(NamedTuple):
    """The metrics of the steps of an epoch so far.

    Attributes:
      sums: losses and metrics, each a pair of float32 (): the sum over the steps, and
        the number of steps whose batch had something to count.
      latest: all scalars of the latest step; NaN for those of nothing.
      bad_step: the first step whose loss or parameters were not finite, int32 (); -1
        for none.
    """

    sums: dict[str, SumAndCount]
    latest: dict[str, Scalar]
    bad_step: Int[Array, ""]


class TrainState(NamedTuple):
    """The state of a run, which a step takes and returns.

    Attributes:
      params: parameters of each network.
      model_state: all other state of each network.
      opt_state: optimizer state of each network.
      ema: moving average of (params, model_state) after each step so far, without the
        values before the first step; () if there is none.
      step: number of steps taken, int32 ().
      key: the PRNG key of the augmentation.
      log: the metrics of the epoch so far.
    """

    params: dict[str, Tree]
    model_state: dict[str, Tree]
    opt_state: dict[str, optax.OptState]
    ema: Tree
    step: Int[Array, ""]
    key: Key[Array, ""]
    log: EpochLog


class StepMetrics(NamedTuple):
    """The scalars of one step.

    Attributes:
      averaged: losses and metrics, which an epoch averages: the mean over the batch and
        1, or 0 and 0 if the batch had nothing to count, such as labeled pixels.
      latest: norms and scalars of the optimizer states; an epoch keeps the values of
        its latest step.
      is_finite: whether all losses and parameters are finite, bool ().
    """

    averaged: dict[str, SumAndCount]
    latest: dict[str, Scalar]
    is_finite: Bool[Array, ""]


TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


class Trainable(NamedTuple):
    """One network of a task and its optimizer.

    Attributes:
      graphdef: the definition of the network.
      tx: its optimizer.
      logged: names of the scalars in the optimizer state that are logged.
    """

    graphdef: nnx.GraphDef[models.Network]
    tx: optax.GradientTransformationExtraArgs
    logged: tuple[str, ...] = ()


def make_train_step(
    task: Task,
    trainables: Mapping[str, Trainable],
    *,
    grad_accum_steps: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Makes the training step, a pure function (state, batch) -> (state, metrics).

    Networks train one after the other on the same batch. The loss of a network sees the
    updates of the networks before it. The step does not change the log of the state.

    Args:
      task: the task, whose losses are minimized.
      trainables: its networks by name, in the order in which they train.
      grad_accum_steps: number of parts that a batch is split into.
      ema_decay: decay of the moving average; 0 for none.
    """

    def train_network(
        name: str, state: TrainState, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        def loss_fn(model: models.Network, batch: Batch) -> tuple[SumAndCount, Metrics]:
            networks = {
                other: model
                if other == name
                else nnx.merge(
                    trainable.graphdef, state.params[other], state.model_state[other]
                )
                for other, trainable in trainables.items()
            }
            loss, metrics = task.loss(name, networks, batch)
            return loss, metrics | {"loss": loss}

        graphdef, tx, logged = trainables[name]
        params = state.params[name]
        out = batch_gradients(
            loss_fn,
            graphdef,
            params,
            state.model_state[name],
            batch,
            grad_accum_steps=grad_accum_steps,
        )
        updates, opt_state = tx.update(
            out.grads, state.opt_state[name], params, grad_fn=out.grad_fn
        )
        params = optax.apply_updates(params, updates)
        state = state._replace(
            params=state.params | {name: params},
            model_state=state.model_state | {name: out.model_state},
            opt_state=state.opt_state | {name: opt_state},
        )
        averaged = {key: _mean_of_step(*pair) for key, pair in out.aux.items()}
        norms = dict(
            zip(
                ("gradient_norm", "update_norm", "parameter_norm"),
                optax_tricks.global_norms(out.grads, updates, params),
                strict=True,
            )
        )
        is_finite = jnp.isfinite(jnp.stack([out.loss, norms["parameter_norm"]])).all()
        scalars = {field: optax.tree.get(opt_state, field) for field in logged}
        return state, StepMetrics(averaged, norms | scalars, is_finite)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        batch = task.prepare(batch, jax.random.fold_in(state.key, state.step))
        metrics = StepMetrics({}, {}, jnp.bool_(True))
        for name in trainables:
            state, found = train_network(name, state, batch)
            prefix = f"{name}_" if len(trainables) > 1 else ""
            metrics = StepMetrics(
                metrics.averaged | {prefix + k: v for k, v in found.averaged.items()},
                metrics.latest | {prefix + k: v for k, v in found.latest.items()},
                metrics.is_finite & found.is_finite,
            )
        if ema_decay:
            weight = _weight_of_latest(ema_decay, state.step + 1)
            move = functools.partial(_moving_average, weight=weight)
            new = (state.params, state.model_state)
            state = state._replace(ema=jax.tree.map(move, state.ema, new))
        return state._replace(step=state.step + 1), metrics

    return train_step


def _weight_of_latest(decay: float, steps: Int[Array, ""]) -> Scalar:
    """Returns the weight of the latest of `steps` values in their moving average.

    The value of k steps ago has the weight decay**k / (1 + ... + decay**(steps - 1)).
    This is the bias correction of Adam and `optax.ema`, applied at each step: the first
    value replaces the one before training, and long runs have the weight 1 - decay.
    """
    return (1 - decay) / -jnp.expm1(steps * math.log(decay))


def _moving_average(old: jax.Array, new: jax.Array, weight: Scalar) -> jax.Array:
    """Moves floating-point arrays by `weight`, and replaces counters and keys."""
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return new
    return old + (weight * (new - old)).astype(old.dtype)


def init_state(
    networks: Networks,
    trainables: Mapping[str, Trainable],
    key: Key[Array, ""],
    *,
    ema_decay: float = 0.0,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      networks: the networks by name.
      trainables: their graph definitions and optimizers by name.
      key: the PRNG key of the augmentation.
      ema_decay: decay of the moving average; 0 for none.

    Returns:
      The state. Its log has no metrics, since their names are not known yet.
    """
    parts = {name: split(networks[name]) for name in trainables}
    params = {name: part[1] for name, part in parts.items()}
    model_state = {name: part[2] for name, part in parts.items()}
    return TrainState(
        params=params,
        model_state=model_state,
        opt_state={name: t.tx.init(params[name]) for name, t in trainables.items()},
        # A copy, as the state is donated and no array may be donated twice.
        ema=jax.tree.map(jnp.copy, (params, model_state)) if ema_decay else (),
        step=jnp.int32(0),
        key=key,
        log=empty_log(StepMetrics({}, {}, jnp.bool_(True))),
    )


def eval_params(state: TrainState) -> tuple[Tree, Tree]:
    """Returns the (params, model_state) to evaluate: the average if there is one."""
    return state.ema or (state.params, state.model_state)


def eval_networks(
    graphdefs: Mapping[str, nnx.GraphDef[models.Network]],
    params: Mapping[str, Tree],
    model_state: Mapping[str, Tree],
) -> Networks:
    """Returns networks in evaluation mode: running statistics, no dropout."""
    return {
        name: nnx.view(
            nnx.merge(graphdef, params[name], model_state[name], copy=True),
            raise_if_not_found=False,  # it may have neither dropout nor statistics
            deterministic=True,
            use_running_average=True,
        )
        for name, graphdef in graphdefs.items()
    }


def empty_log(metrics: StepMetrics) -> EpochLog:
    """Returns the log before the first step, for steps that return such metrics."""
    averaged, latest = optax.tree.zeros_like((metrics.averaged, metrics.latest))
    return EpochLog(averaged, _values(averaged) | latest, jnp.int32(-1))


def without_log(state: TrainState) -> TrainState:
    """Returns the state with a log that has no metrics, as `init_state` does."""
    return state._replace(log=EpochLog({}, {}, state.log.bad_step))


def add_to_log(log: EpochLog, metrics: StepMetrics, step: Int[Array, ""]) -> EpochLog:
    """Returns the log with the metrics of one more step."""
    is_first_bad = (log.bad_step < 0) & ~metrics.is_finite
    return EpochLog(
        sums=optax.tree.add(log.sums, metrics.averaged),
        latest=_values(metrics.averaged) | metrics.latest,
        bad_step=jnp.where(is_first_bad, step, log.bad_step),
    )


def _mean_of_step(total: Scalar, count: Scalar) -> SumAndCount:
    is_known = count > 0
    mean = jnp.where(is_known, total / jnp.where(is_known, count, 1), 0)
    return mean, is_known.astype(jnp.float32)


def _values(averaged: Mapping[str, SumAndCount]) -> dict[str, Scalar]:
    """Returns the means of a step, with NaN for those of nothing."""
    return {
        key: jnp.where(is_known > 0, value, jnp.nan).astype(value.dtype)
        for key, (value, is_known) in averaged.items()
    }
