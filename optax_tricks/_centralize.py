"""Gradient Centralization: subtracts the mean from each output unit's gradient."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from optax_tricks._documentation import see
from optax_tricks._numerics import accumulator_dtype
from optax_tricks._validation import check_leaves, show_leaf

Axes: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[Any, ...]
# A tree with an `Axes`, a layout or None for every leaf of the gradient.
AxesTree: TypeAlias = Any

# The place of the output axis in a kernel with n dimensions, by the kernel's layout.
_OUTPUT_AXES: dict[str, Callable[[int], int]] = {
    "...io": lambda n: n - 1,
    "oi...": lambda n: 0,
    "io...": lambda n: 1,
    "...oi": lambda n: n - 2,
}


def centralize(
    reduction_axes: (
        str | Axes | AxesTree | Callable[[optax.Updates], Any] | None
    ) = None,
    *,
    conv_only: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts its mean from the weight gradient of each output unit.

    The updates must still be multiplied by a learning rate. For the gradient
    $g_i$ of the $M$ weights that feed output unit $i$,

    $$
    g_i \mapsto g_i - \tfrac{1}{M} e e^\top g_i ,
    $$

    with $e$ the vector of ones. This is a projection. It needs one reduction and no
    state. The mean is taken over the axes of the weights that feed a unit. In Flax and
    Haiku, kernels have the shape (..., in, out), so these are all axes but the last.
    Without ``reduction_axes``:

    * In a ``kernel`` of Conv (plain, grouped or depthwise), ConvTranspose, Linear or
      the attention output, the mean is over all axes but the last.
    * In a three-dimensional ``kernel`` under ``query``, ``key`` or ``value``, which has
      the shape (in, heads, head_dim), the mean is over axis 0.
    * A ``bias``, a ``scale``, a leaf with ``embed`` in its own name and a leaf with
      fewer than two dimensions are not changed.
    * In any other leaf, the mean is over all axes but the last.
    * A leaf with a single entry along the axes (a Linear layer with one input, a class
      token) is not changed, even if the axes are given. Its gradient would be zero, and
      it would never train.

    These rules are wrong for some layers that names and shapes cannot identify:
    LinearGeneral with several output axes (the mean is also over its output axes but
    the last), Einsum, a one-dimensional Conv named query, key or value, ConvTranspose
    with ``transpose_kernel=True`` (in and out are swapped: give ``"...oi"``), and
    layers stacked along a leading axis by scan or vmap. Give the axes for those, as in
    the second example.

    The rules are for Flax and Haiku. For other libraries name the layout of all
    kernels. In a name, ``o`` is the axis of output units, ``i`` the axis of inputs, and
    ``...`` stands for any number of spatial axes:

    | layout | mean over | kernels |
    | --- | --- | --- |
    | `...io` | all axes but the last | Flax (Linen and NNX), Haiku, Keras |
    | `oi...` | all but the first | PyTorch, Equinox, also its transposed ones |
    | `io...` | all but the second | transposed ones of PyTorch, without groups |
    | `...oi` | all but the second to last | Flax, with `transpose_kernel=True` |

    PyTorch and Equinox call the array of an embedding ``weight``, as that of a linear
    layer, so give ``()`` for it.

    The place in the chain matters. L2 regularization belongs before this transform
    (``add_decayed_weights``), and decoupled weight decay after it. Before Adam, this
    transform centralizes the gradient, as in the paper. After ``scale_by_adam``, it
    centralizes the direction, as in the authors' later code.

    Args:
      reduction_axes: None for the rules above; or one layout or tuple of axes for all
        leaves except those that the rules do not change because of their name or their
        number of dimensions; or a tree, or a prefix of one, in which each entry is a
        layout, a tuple of axes, ``()`` for a leaf that is not changed, or None for the
        rules above; or a function that maps the gradient to one of these. Entries of a
        tree that match no leaf are ignored, so that the tree can be used under
        `optax.masked`. A tree may be of a class with ``__call__``, such as an Equinox
        module. In `optax.inject_hyperparams`, a function needs
        ``static_args=("reduction_axes",)``, or it is called as a schedule.
      conv_only: change only leaves with more than three dimensions, which are the
        kernels of convolutions over two or more dimensions. The paper does this on
        CIFAR-100.

    Returns:
      An `optax.GradientTransformationExtraArgs` with an `optax.EmptyState`. Leaves
      keep their shape and dtype. Complex leaves are supported.

    Raises:
      ValueError: if ``reduction_axes`` is no layout, or ``()``, or if ``conv_only`` is
        neither True nor False; on update, if ``reduction_axes`` do not fit a leaf or
        have no entry for it, or if a leaf is neither floating-point nor complex.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_tricks
      >>> tx = optax.chain(optax_tricks.centralize(), optax.sgd(1.0))
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> grads = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"][:, 0], updates["bias"])
      [ 1.5 -1.5] [-1. -1. -1.]

      Give axes for one layer, and use the rules for all others:

      >>> def axes(grads):
      ...     return {**dict.fromkeys(grads), "up": {"kernel": (0, 1, 3), "bias": ()}}
      >>> grads = {"up": {"kernel": jnp.ones((2, 2, 4, 3)), "bias": jnp.ones(4)}}
      >>> updates, _ = optax_tricks.centralize(axes).update(grads, optax.EmptyState())
      >>> print(jnp.abs(updates["up"]["kernel"]).max(), updates["up"]["bias"])
      0.0 [1. 1. 1. 1.]

      Name the layout of an Equinox or PyTorch network:

      >>> tx = optax_tricks.centralize("oi...")
      >>> grads = {"weight": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(grads, optax.EmptyState())
      >>> print(updates["weight"][0], updates["bias"])
      [-1.  0.  1.] [1. 1.]

    References:
      H. Yong, J. Huang, X. Hua, L. Zhang, [Gradient Centralization: A New
      Optimization Technique for Deep Neural
      Networks](https://arxiv.org/abs/2004.01461), 2020
    """
    if conv_only not in (True, False):
        raise ValueError(
            f"centralize: conv_only must be True or False, got {conv_only!r}."
        )
    if isinstance(reduction_axes, str):
        _output_axis(reduction_axes, 2)
    elif isinstance(reduction_axes, tuple) and not reduction_axes:
        raise ValueError(
            "centralize: reduction_axes=() would change no leaf. If a function in "
            "optax.inject_hyperparams returned it, which calls functions as schedules, "
            'add static_args=("reduction_axes",).'
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        check_leaves("centralize", updates)
        axes = _axes_per_leaf(reduction_axes, updates, conv_only)
        leaves, treedef = jax.tree.flatten(updates)
        centered = map(_subtract_mean, leaves, axes)
        return jax.tree.unflatten(treedef, centered), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _axes_per_leaf(
    reduction_axes: Any, updates: optax.Updates, conv_only: bool
) -> list[Axes]:
    """Returns the reduction axes of each leaf in flattening order, () for none."""
    if _is_function(reduction_axes, updates):
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


def _axes(given: Axes | str | None, path: Path, leaf: jax.Array) -> Axes:
    if given is not None and not isinstance(given, str):
        axes = _checked(given, path, leaf)
    elif _is_left_alone(path, leaf):
        axes = ()
    elif given is not None:
        output = _output_axis(given, jnp.ndim(leaf))
        axes = tuple(axis for axis in range(jnp.ndim(leaf)) if axis != output)
    else:
        attention = jnp.ndim(leaf) == 3 and (
            _names(path) in [(name, "kernel") for name in ("query", "key", "value")]
        )
        axes = (0,) if attention else tuple(range(jnp.ndim(leaf) - 1))
    # A single entry minus its mean would be zero, and it would never train.
    return axes if math.prod(jnp.shape(leaf)[axis] for axis in axes) > 1 else ()


def _is_left_alone(path: Path, leaf: jax.Array) -> bool:
    _, name = _names(path)
    return jnp.ndim(leaf) < 2 or name in ("bias", "scale") or "embed" in name


def _names(path: Path) -> tuple[str, str]:
    """Returns the last two names in a path, with "" for those that are missing."""
    if path and path[-1] == GetAttrKey("value"):  # the value inside an nnx.Variable
        path = path[:-1]
    parent, name = (["", ""] + [_name(key) for key in path])[-2:]
    return parent, name


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _is_function(reduction_axes: Any, updates: optax.Updates) -> bool:
    """Tells a function from a tree, whose class may have `__call__` too."""
    if isinstance(reduction_axes, functools.partial):  # also jax.tree_util.Partial
        return True
    # Equinox's jitted functions are trees too, with a name in them.
    entries = [
        entry
        for entry in jax.tree.leaves(reduction_axes, is_leaf=_is_axes)
        if isinstance(entry, str | tuple)
    ]
    is_tree = type(reduction_axes) is type(updates) or any(
        entry in _OUTPUT_AXES or isinstance(entry, tuple) for entry in entries
    )
    return callable(reduction_axes) and not is_tree


def _is_axes(node: Any) -> bool:
    return node is None or (
        isinstance(node, tuple) and all(isinstance(x, numbers.Integral) for x in node)
    )


def _output_axis(layout: str, ndim: int) -> int:
    if layout not in _OUTPUT_AXES:
        known = ", ".join(map(repr, _OUTPUT_AXES))
        raise ValueError(
            f"centralize: reduction_axes must be one of the layouts {known}, or axes; "
            f"got {layout!r}. Flax has '...io', PyTorch and Equinox have 'oi...'."
            + see("guides/layouts.md")
        )
    return _OUTPUT_AXES[layout](ndim)


def _entry_for(entries: dict[Path, Any], path: Path, leaf: jax.Array) -> Any:
    """Finds the entry for a leaf in a tree of axes or a prefix of one."""
    for length in range(len(path) + 1):
        if path[:length] in entries:
            return entries[path[:length]]
    raise ValueError(
        f"centralize: reduction_axes have no entry for leaf {show_leaf(path, leaf)}. "
        "Give a tuple of axes, () to leave it unchanged, or None for the rules."
        + see("guides/layouts.md#layers-of-several-layouts")
    )


def _checked(axes: Any, path: Path, leaf: jax.Array) -> Axes:
    n = jnp.ndim(leaf)
    valid = _is_axes(axes) and all(-n <= axis < n for axis in axes)
    if not valid or len({axis % n for axis in axes}) < len(axes):
        raise ValueError(
            f"centralize: reduction_axes {axes} do not fit leaf "
            f"{show_leaf(path, leaf)}. Give a tuple of distinct axes from {-n} to "
            f"{n - 1}, or () to leave it unchanged."
            + see("guides/layouts.md#layers-of-several-layouts")
        )
    return tuple(axes)


def _subtract_mean(g: jax.Array, axes: Axes) -> jax.Array:
    if not axes:
        return g
    wide = jnp.asarray(g, accumulator_dtype(g))
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    return (wide - mean).astype(jnp.result_type(g))
