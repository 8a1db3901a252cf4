"""One training step: what a task is asked for, the state, and the pure function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optax_tricks.nnx import batch_gradients, split
from train.optimizers import OptimizerConfig, trick_scalars

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name: (sum, count)
Models = dict[str, nnx.Module]
Record = dict[str, float]


class Task(Protocol):
    """What the loop asks of a task. A batch is a dict of arrays."""

    def create_models(self, rngs: nnx.Rngs) -> Models:
        """Networks with fresh parameters, in the order in which a step trains them."""

    def load(self, models: Models) -> None:
        """Puts pretrained weights into networks just created, if there are any."""

    def optimizer_for(self, name: str) -> OptimizerConfig:
        """By what a network is trained."""

    def prepare(self, batch: Tree, key: jax.Array) -> Tree:
        """Turns stored examples into a training batch; runs inside the step."""

    def loss(self, name: str, models: Models, batch: Tree) -> tuple[jax.Array, Metrics]:
        """The mean loss that a network minimises over a prepared batch, and metrics."""

    def evaluate(self, models: Models, batch: Tree) -> Tree:
        """Arrays to be added up over stored examples, none where "weight" is 0."""

    def scores(self, totals: Tree) -> Record:
        """What the arrays added up over all examples amount to."""


class Log(NamedTuple):
    """What the steps of an epoch have given to log so far.

    Attributes:
      sums: loss and metrics, added up over steps.
      last: all scalars of the last step.
      steps: how many there were, int32.
      bad_step: the first whose loss or parameters were not finite, int32; -1 for none.
    """

    sums: dict[str, jax.Array]
    last: dict[str, jax.Array]
    steps: jax.Array
    bad_step: jax.Array


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      params: by network.
      model_state: all other state of the networks, by network.
      opt_state: by network.
      average: moving average of (params, model_state); () without.
      step: number of steps taken, int32.
      key: of augmentation.
      log: of the epoch.
    """

    params: dict[str, Tree]
    model_state: dict[str, Tree]
    opt_state: dict[str, optax.OptState]
    average: Tree
    step: jax.Array
    key: jax.Array
    log: Log


class Scalars(NamedTuple):
    """What a step gives to log.

    Attributes:
      mean: what an epoch's record averages over its steps, the loss among them.
      last: what it takes from its last step.
    """

    mean: dict[str, jax.Array]
    last: dict[str, jax.Array]


TrainStep: TypeAlias = Callable[[TrainState, Tree], tuple[TrainState, Scalars]]


class Network(NamedTuple):
    """One network of a task: its definition, and the optimizer that trains it."""

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformationExtraArgs


def make_train_step(
    task: Task,
    networks: Mapping[str, Network],
    *,
    accumulate: int = 1,
    ema: float = 0.0,
) -> TrainStep:
    """The pure function (state, batch) -> (state, scalars to log).

    Networks are trained one after the other on the same batch, each with the others as
    they are by then. The log of the state is left as it is.

    Args:
      task: whose losses are minimised.
      networks: by name, in the order in which they are trained.
      accumulate: parts that a batch is cut into.
      ema: decay of the moving average; 0 for none.
    """

    def learn(
        name: str, state: TrainState, batch: Tree
    ) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
        """Trains one network: the state, what to average, and what not to."""

        def loss_fn(model: nnx.Module, batch: Tree) -> tuple[jax.Array, Metrics]:
            models = {
                other: model
                if other == name
                else nnx.merge(
                    network.graphdef, state.params[other], state.model_state[other]
                )
                for other, network in networks.items()
            }
            return task.loss(name, models, batch)

        graphdef, tx = networks[name]
        params = state.params[name]
        out = batch_gradients(
            loss_fn,
            graphdef,
            params,
            state.model_state[name],
            batch,
            grad_accum_steps=accumulate,
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
        ratios = {key: total / count for key, (total, count) in out.aux.items()}
        norms = {
            "gradient_norm": optax.tree.norm(out.grads),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
        }
        return state, {"loss": out.loss, **ratios}, norms | trick_scalars(opt_state)

    def train_step(state: TrainState, batch: Tree) -> tuple[TrainState, Scalars]:
        batch = task.prepare(batch, jax.random.fold_in(state.key, state.step))
        mean, last = {}, {}
        for name in networks:
            state, means, others = learn(name, state, batch)
            prefix = f"{name}_" if len(networks) > 1 else ""
            mean |= {prefix + key: value for key, value in means.items()}
            last |= {prefix + key: value for key, value in others.items()}
        if ema:
            now = (state.params, state.model_state)
            average = jax.tree.map(
                lambda new, old: _moved(old, new, 1 - ema), now, state.average
            )
            state = state._replace(average=average)
        return state._replace(step=state.step + 1), Scalars(mean, last)

    return train_step


def _moved(old: jax.Array, new: jax.Array, by: float) -> jax.Array:
    """A moving average; counters and keys are taken over."""
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return new
    return old + (by * (new - old)).astype(old.dtype)


def new_state(
    models: Models, networks: Mapping[str, Network], key: jax.Array, *, ema: float = 0.0
) -> TrainState:
    """The state of networks before the first step, with an empty log of no scalars."""
    parts = {name: split(models[name]) for name in networks}
    params = {name: part[1] for name, part in parts.items()}
    model_state = {name: part[2] for name, part in parts.items()}
    return TrainState(
        params=params,
        model_state=model_state,
        opt_state={name: networks[name].tx.init(params[name]) for name in networks},
        # A copy: the state is donated, and no array twice.
        average=jax.tree.map(jnp.copy, (params, model_state)) if ema else (),
        step=jnp.int32(0),
        key=key,
        log=empty_log(Scalars({}, {})),
    )


def evaluation_models(
    graphdefs: Mapping[str, nnx.GraphDef],
    params: Mapping[str, Tree],
    model_state: Mapping[str, Tree],
) -> Models:
    """Networks as they are evaluated: running statistics, no dropout."""
    return {
        name: nnx.view(
            nnx.merge(graphdef, params[name], model_state[name], copy=True),
            raise_if_not_found=False,  # a network may have neither
            deterministic=True,
            use_running_average=True,
        )
        for name, graphdef in graphdefs.items()
    }


def empty_log(scalars: Scalars) -> Log:
    """Of no step, for such scalars as these."""
    mean, last = optax.tree.zeros_like(scalars)
    return Log(mean, mean | last, jnp.int32(0), jnp.int32(-1))


def add_to_log(log: Log, scalars: Scalars, step: jax.Array) -> Log:
    """The log with the scalars of a step."""
    finite = [
        jnp.isfinite(value)
        for key, value in (scalars.mean | scalars.last).items()
        if key.endswith(("loss", "parameter_norm"))
    ]
    is_new = (log.bad_step < 0) & ~jnp.stack(finite).all()
    return Log(
        sums=optax.tree.add(log.sums, scalars.mean),
        last=scalars.mean | scalars.last,
        steps=log.steps + 1,
        bad_step=jnp.where(is_new, step, log.bad_step),
    )
