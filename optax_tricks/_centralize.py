"""Gradient Centralization: each output unit's gradient minus its mean."""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from optax_tricks._numerics import accumulator_dtype

Axes: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[Any, ...]
AxesTree: TypeAlias = Any  # a tree with an `Axes` for every leaf of the gradient


def centralize(
    reduction_axes: Axes | AxesTree | Callable[[optax.Updates], Any] | None = None,
    *,
    conv_only: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts from each output unit's weight gradient its mean.

    The result is still to be multiplied by a learning rate. For the gradient
    :math:`g_i` of the :math:`M` weights that feed output unit :math:`i`,

    .. math::
      g_i \mapsto g_i - \tfrac{1}{M} \mathbf{1}\mathbf{1}^\top g_i ,

    a projection that takes one reduction and no memory. The mean is taken over the
    axes that feed a unit. In the layouts of Flax and Haiku, kernels are (..., in, out)
    and these are all axes but the last. Without `reduction_axes`:

    * ``kernel`` of Conv (plain, grouped, depthwise), ConvTranspose, Linear, and the
      attention output: all axes but the last;
    * a three-dimensional ``kernel`` under ``query``, ``key`` or ``value``: axis 0, as
      its shape is (in, heads, head_dim);
    * ``bias``, ``scale``, names with ``embed`` in them, and everything under two
      dimensions: left alone;
    * any other array: all axes but the last;
    * a leaf where the axes hold a single entry (a Linear layer with one input, a class
      token): left alone, also where the axes are given, since its gradient would vanish
      and never train it.

    Where the tree cannot tell, the rule for a ``kernel`` applies and may be wrong:
    LinearGeneral with several output axes (its output axes but the last are averaged
    too), Einsum, a one-dimensional Conv called query, key or value, ConvTranspose with
    ``transpose_kernel=True`` (in and out are swapped: give ``(0, 1, 3)``), and layers
    stacked along a leading axis by scan or vmap. Say the axes for those, as in the
    second example. PyTorch's layout (out, in, ...), which Equinox shares, needs
    ``(1, ..., ndim - 1)`` everywhere.

    The place in the chain is part of the method. L2 regularisation goes inside the
    projection (``add_decayed_weights`` before this member), decoupled decay stays
    outside. Before Adam it centralizes the gradient as in the paper; after
    ``scale_by_adam`` it centralizes the direction, as the authors' later code does.

    Args:
      reduction_axes: None for the rules above; one tuple of axes in place of "all
        axes but the last" and of the attention rule (leaves left alone by name or
        dimension still are); a tree, or a prefix of one, with a tuple to take
        literally, ``()`` to leave alone, or None for the rules above; or a function
        from the gradient, which has the tree and shapes of the parameters, to one of
        these. Entries of a tree without a leaf are ignored, as masks need it.
      conv_only: take convolutions of two or more dimensions only, that is leaves with
        more than three, as the paper does on CIFAR-100.

    Returns:
      An `optax.GradientTransformationExtraArgs` with an `optax.EmptyState`. Leaves
      keep shape and dtype; complex leaves are right.

    Raises:
      ValueError: on update, if `reduction_axes` do not fit a leaf or give none for it.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> tx = optax.chain(optax_tricks.centralize(), optax.sgd(1.0))
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> grads = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"][:, 0], updates["bias"])
      [ 1.5 -1.5] [-1. -1. -1.]

      Axes of one's own for one layer, the rules for all others:

      >>> def axes(grads):
      ...     return {**dict.fromkeys(grads), "up": {"kernel": (0, 1, 3), "bias": ()}}
      >>> grads = {"up": {"kernel": jnp.ones((2, 2, 4, 3)), "bias": jnp.ones(4)}}
      >>> updates, _ = optax_tricks.centralize(axes).update(grads, optax.EmptyState())
      >>> print(jnp.abs(updates["up"]["kernel"]).max(), updates["up"]["bias"])
      0.0 [1. 1. 1. 1.]

    References:
      H. Yong, J. Huang, X. Hua, L. Zhang, `Gradient Centralization: A New
      Optimization Technique for Deep Neural Networks
      <https://arxiv.org/abs/2004.01461>`_, 2020
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        axes = _axes_per_leaf(reduction_axes, updates, conv_only)
        leaves, treedef = jax.tree.flatten(updates)
        centred = map(_subtract_mean, leaves, axes)
        return jax.tree.unflatten(treedef, centred), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _axes_per_leaf(
    reduction_axes: Any, updates: optax.Updates, conv_only: bool
) -> list[Axes]:
    """The axes to average over for each leaf, in flattening order; () for none."""
    if callable(reduction_axes):
        reduction_axes = reduction_axes(updates)
    paths_and_leaves = jax.tree.leaves_with_path(updates)
    if reduction_axes is not None and _is_axes(reduction_axes):
        given = [
            () if _is_left_alone(path, leaf) else reduction_axes
            for path, leaf in paths_and_leaves
        ]
    else:
        entries = dict(jax.tree.leaves_with_path(reduction_axes, is_leaf=_is_axes))
        given = [_entry_for(entries, path, leaf) for path, leaf in paths_and_leaves]
    return [
        _axes(axes, path, leaf) if jnp.ndim(leaf) > 3 or not conv_only else ()
        for axes, (path, leaf) in zip(given, paths_and_leaves, strict=True)
    ]


def _axes(given: Axes | None, path: Path, leaf: jax.Array) -> Axes:
    if given is not None:
        axes = _checked(given, path, leaf)
    elif _is_left_alone(path, leaf):
        axes = ()
    else:
        attention = jnp.ndim(leaf) == 3 and (
            _names(path) in [(name, "kernel") for name in ("query", "key", "value")]
        )
        axes = (0,) if attention else tuple(range(jnp.ndim(leaf) - 1))
    # Minus its own mean, a single entry would be zero and never train.
    return axes if math.prod(jnp.shape(leaf)[axis] for axis in axes) > 1 else ()


def _is_left_alone(path: Path, leaf: jax.Array) -> bool:
    _, name = _names(path)
    return jnp.ndim(leaf) < 2 or name in ("bias", "scale") or "embed" in name


def _names(path: Path) -> tuple[str, str]:
    """The names of the last two levels above a leaf, "" where there are fewer."""
    if path and path[-1] == GetAttrKey("value"):  # the inside of an nnx.Variable
        path = path[:-1]
    parent, name = (["", ""] + [_name(key) for key in path])[-2:]
    return parent, name


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _is_axes(node: Any) -> bool:
    return node is None or (
        isinstance(node, tuple) and all(isinstance(x, numbers.Integral) for x in node)
    )


def _entry_for(entries: dict[Path, Any], path: Path, leaf: jax.Array) -> Any:
    """What a tree of axes, or a prefix of one, gives for a leaf."""
    for length in range(len(path) + 1):
        if path[:length] in entries:
            return entries[path[:length]]
    raise ValueError(
        f"centralize: reduction_axes give none for leaf {_show(path, leaf)}: "
        "give a tuple of axes, () to leave it alone, or None for the rules."
    )


def _show(path: Path, leaf: jax.Array) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"'{name}' of shape {jnp.shape(leaf)}"


def _checked(axes: Any, path: Path, leaf: jax.Array) -> Axes:
    n = jnp.ndim(leaf)
    valid = _is_axes(axes) and all(-n <= axis < n for axis in axes)
    if not valid or len({axis % n for axis in axes}) < len(axes):
        raise ValueError(
            f"centralize: reduction_axes {axes} do not fit leaf {_show(path, leaf)}: "
            f"give a tuple of distinct axes from {-n} to {n - 1}, or () to leave it "
            "alone."
        )
    return tuple(axes)


def _subtract_mean(g: jax.Array, axes: Axes) -> jax.Array:
    if not axes:
        return g
    wide = jnp.asarray(g, accumulator_dtype(g))
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    return (wide - mean).astype(jnp.result_type(g))
