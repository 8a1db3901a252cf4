"""Makes the optax chain that an `OptimizerConfig` describes."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from train.errors import UsageError
from train.optim.chain import regularizes_both
from train.optim.config import OptimizerConfig
from train.optim.schedules import make_schedule
from train.optim.techniques import TECHNIQUES


def learning_rate(
    config: OptimizerConfig, *, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Makes the learning rate schedule that a config describes.

    Args:
      config: the settings of the schedule.
      total_steps: steps of the run.
      steps_per_epoch: steps of an epoch, for settings in epochs.

    Raises:
      UsageError: if the warm-up leaves no step to train.
    """
    return make_schedule(
        config.schedule,
        peak=config.learning_rate,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        milestones=config.milestones,
        decay_factor=config.decay_factor,
        half_period=config.half_period,
    )


def make_optimizer(
    config: OptimizerConfig,
    *,
    total_steps: int,
    steps_per_epoch: int,
    key: jax.Array,
    head: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Makes the chain that a config describes, which ends with the learning rate.

    Args:
      config: the base optimizer and the techniques; `OptimizerConfig.chain` is their
        order.
      total_steps: steps of the run, for the schedule.
      steps_per_epoch: steps of an epoch, for settings in epochs.
      key: the PRNG key of the techniques. It only enters the initial state.
      head: dotted paths of the modules that train with `head_learning_rate`, such as
        "classifier.6".

    Raises:
      UsageError: if there is a head learning rate without a head, or the warm-up
        leaves no step to train.
    """
    schedule = learning_rate(
        config, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    transforms = [_transform(name, config, schedule, key) for name in config.chain]
    if config.optimizer == "lamb":
        transforms.append(optax.scale_by_trust_ratio())
    transforms.append(optax.scale_by_learning_rate(schedule))
    if config.head_learning_rate is not None:
        if not head:
            raise UsageError(
                f"a head_learning_rate of {config.head_learning_rate} needs a network "
                "whose last layer is known: leave it out, or take another network"
            )
        factor = config.head_learning_rate / config.learning_rate
        transforms.append(optax.masked(optax.scale(factor), _head_mask(head)))
    return optax.chain(*transforms)


def _transform(
    name: str, config: OptimizerConfig, schedule: optax.Schedule, key: jax.Array
) -> optax.GradientTransformation:
    match name:
        case "clip":
            return optax.clip_by_global_norm(config.clip_norm)
        case "decay":
            return _decay(config)
        case "optimizer":
            return _direction(config)
    transform = TECHNIQUES[name].build(config, schedule, key)
    if regularizes_both(name) and "decay" not in config.chain:
        return _with_l2(transform, _decay(config))
    return transform


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes the base optimizer of optax, without weight decay and learning rate."""
    b1, b2 = config.momentum, config.b2
    match config.optimizer:
        case "sgd" | "sgdw":
            return optax.trace(b1, config.nesterov) if b1 > 0 else optax.identity()
        case "adam" | "adamw":
            return optax.scale_by_adam(b1, b2)
        case "lamb":
            return optax.scale_by_adam(b1, b2, eps=1e-6)
        case "adagrad":
            return optax.scale_by_rss()
        case "rmsprop":
            return optax.scale_by_rms()
        case "muon":
            return optax.contrib.muon(
                learning_rate=-1.0,  # the learning rate of the chain negates it again
                beta=b1,
                adam_b2=b2,
                muon_weight_dimension_numbers=_kernel_matrices,
            )
    raise UsageError(f"unknown optimizer {config.optimizer!r}")


def _kernel_matrices(params: Any) -> Any:
    """Returns which axes of each kernel Muon takes as the rows and columns of a matrix.

    Rows are the inputs of an output unit, and columns are the output units. In kernels
    of convolutions and linear layers, rows are all axes but the last. Kernels under
    query, key and value have the shape (in, heads, head_dim): rows are the first axis.
    All other parameters, such as embeddings and biases, have None and are left to Adam.
    """

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        *_, parent, name = ("", *_dotted(path).split("."))
        if name != "kernel" or leaf.ndim < 2:
            return None
        projects = leaf.ndim == 3 and parent in ("query", "key", "value")
        inputs = 1 if projects else leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(inputs)), tuple(range(inputs, leaf.ndim))
        )

    return jax.tree.map_with_path(axes, params)


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
    mask = None if config.decay_all else _is_weight
    return optax.add_decayed_weights(config.weight_decay, mask)


def _is_weight(params: Any) -> Any:
    """Returns a mask that is False for norms and biases.

    Names are needed too, since biases of attention have two dimensions.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.ndim > 1 and _dotted(path[-1:]) != "bias", params
    )


def _head_mask(head: tuple[str, ...]) -> Callable[[Any], Any]:
    """Makes a function that masks the leaves below the modules of `head`."""

    def mask(params: Any) -> Any:
        names = [_dotted(path) for path, _ in jax.tree.leaves_with_path(params)]
        for module in head:
            if not any(name.startswith(f"{module}.") for name in names):
                raise ValueError(f"no parameters below {module!r} in {names}")
        prefixes = tuple(f"{module}." for module in head)
        return jax.tree.map_with_path(
            lambda path, _: _dotted(path).startswith(prefixes), params
        )

    return mask


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _with_l2(
    inner: optax.GradientTransformationExtraArgs, decay: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the L2 regularization to both gradients of `inner`."""

    def regularized(grads: Any, params: Any) -> Any:
        return decay.update(grads, decay.init(params), params)[0]  # decay is stateless

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[Any, Any], Any],
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(
            regularized(updates, params),
            state,
            params,
            grad_fn=lambda point, step: regularized(grad_fn(point, step), point),
            **extra_args,
        )

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
