"""Layouts by name, and trees of axes that can be called, checked with NumPy."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks


def centralized(grads: Any, reduction_axes: Any, **options: Any) -> Any:
    tx = optax_tricks.centralize(reduction_axes, **options)
    updates, _ = tx.update(grads, tx.init(grads))
    return updates


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# Layer, layout, shape, axes of the mean.
KERNELS = [
    ("PyTorch Linear", "oi...", (4, 3), (1,)),
    ("PyTorch Conv1d", "oi...", (4, 3, 5), (1, 2)),
    ("PyTorch Conv2d", "oi...", (4, 3, 5, 2), (1, 2, 3)),
    ("PyTorch Conv3d", "oi...", (4, 3, 5, 2, 2), (1, 2, 3, 4)),
    ("PyTorch grouped Conv2d", "oi...", (6, 2, 3, 3), (1, 2, 3)),
    ("PyTorch depthwise Conv2d", "oi...", (6, 1, 3, 3), (1, 2, 3)),
    ("PyTorch LSTM", "oi...", (12, 3), (1,)),
    ("PyTorch ConvTranspose1d", "io...", (3, 4, 5), (0, 2)),
    ("PyTorch ConvTranspose2d", "io...", (3, 4, 5, 2), (0, 2, 3)),
    ("Equinox Linear", "oi...", (4, 3), (1,)),
    ("Equinox ConvTranspose2d", "oi...", (4, 3, 5, 2), (1, 2, 3)),
    ("Flax Linear", "...io", (3, 4), (0,)),
    ("Flax Conv", "...io", (5, 2, 3, 4), (0, 1, 2)),
    ("Flax grouped Conv", "...io", (5, 2, 2, 6), (0, 1, 2)),
    ("Flax Conv, one dimension", "...io", (5, 3, 4), (0, 1)),
    ("Flax transposed kernel", "...oi", (5, 2, 4, 3), (0, 1, 3)),
    ("transposed matrix", "...oi", (4, 3), (1,)),
    ("transposed matrix", "io...", (3, 4), (0,)),
]
each_kernel = pytest.mark.parametrize(
    ("layout", "shape", "axes"),
    [row[1:] for row in KERNELS],
    ids=[row[0] for row in KERNELS],
)


@each_kernel
def test_layouts(layout: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    g = random(*shape)
    grads = {"layer": {"weight": g, "bias": random(4)}, "conv": {"bias": g}}
    got = centralized(grads, layout)
    expected = g - g.mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(got["layer"]["weight"], expected, atol=1e-6)
    np.testing.assert_array_equal(got["layer"]["bias"], grads["layer"]["bias"])
    np.testing.assert_array_equal(got["conv"]["bias"], g)  # (out, 1, 1) in Equinox
    bare = centralized(g, layout)
    np.testing.assert_array_equal(bare, got["layer"]["weight"])
    convolution = centralized(grads, layout, conv_only=True)["layer"]["weight"]
    np.testing.assert_array_equal(convolution, bare if len(shape) > 3 else g)


def test_layouts_as_entries_of_trees() -> None:
    g = random(3, 4)
    grads = {"a": {"w": g, "bias": random(4)}, "b": {"w": g}, "c": g, "d": g}
    tree = {"a": "oi...", "b": {"w": "...io"}, "c": (0, 1), "d": None}
    for axes in (tree, lambda grads: tree):
        got = centralized(grads, axes)
        row, column = g.mean(axis=1, keepdims=True), g.mean(axis=0, keepdims=True)
        np.testing.assert_allclose(got["a"]["w"], g - row, atol=1e-6)
        np.testing.assert_array_equal(got["a"]["bias"], grads["a"]["bias"])
        np.testing.assert_allclose(got["b"]["w"], g - column, atol=1e-6)
        np.testing.assert_allclose(got["c"], g - g.mean(), atol=1e-6)
        np.testing.assert_allclose(got["d"], g - column, atol=1e-6)


UNKNOWN = ["oihw", "OIHW", "oi", "...oi ", "", "torch", "hwio"]


@pytest.mark.parametrize("layout", UNKNOWN)
def test_unknown_layouts_are_refused_with_the_known_ones(layout: str) -> None:
    message = "one of the layouts '...io', 'oi...', 'io...', '...oi', or axes; got "
    message = re.escape(message + repr(layout))
    with pytest.raises(ValueError, match=message):
        optax_tricks.centralize(layout)
    for axes in ({"w": layout}, lambda grads: layout):
        with pytest.raises(ValueError, match=message):
            centralized({"w": random(3, 4)}, axes)


# --- Trees of a class with __call__ ---------------------------------------------------


def register(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))


@register
class Linear:
    """A layer as in Equinox: a tree that can be called."""

    weight: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return self.weight @ x + self.bias


@register
class Model:
    """Layers in a list, as in Equinox."""

    layers: list[Any]
    scale: Any

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale

    def axes(self, grads: Any) -> Any:
        return jax.tree.map(lambda g: (1,) if jnp.ndim(g) > 1 else (), grads)


@register
class AxesOf:
    """A function that is a tree, as jitted and bound functions are in Equinox."""

    model: Model
    name: str = "axes"

    def __call__(self, grads: Any) -> Any:
        return self.model.axes(grads)


G = random(4, 3)
MODEL = Model([Linear(G, random(4)), Linear(random(2, 4), random(2))], jnp.ones(()))
ROWS = jax.tree.map(lambda g: (1,) if jnp.ndim(g) > 1 else (), MODEL)
NAMED = jax.tree.map(lambda g: "oi...", MODEL)
CALLABLES: dict[str, Any] = {
    "tree": ROWS,
    "tree of layouts": NAMED,
    "prefix": Model([Linear("oi...", ()), "oi..."], ()),
    "prefix of the whole": Model("oi...", None),
    "function": MODEL.axes,
    "function that returns a layout": lambda grads: "oi...",
    "partial": functools.partial(lambda tree, grads: tree, ROWS),
    "jax Partial": jax.tree_util.Partial(MODEL.axes),
    "function that is a tree": AxesOf(MODEL),
    "class": type("Axes", (), {"__call__": lambda self, grads: ROWS})(),
}


@pytest.mark.parametrize("axes", CALLABLES.values(), ids=CALLABLES)
def test_a_tree_is_a_tree_even_if_it_can_be_called(axes: Any) -> None:
    got = centralized(MODEL, axes)
    expected = jax.tree.map(
        lambda g: g - g.mean(axis=1, keepdims=True) if jnp.ndim(g) > 1 else g, MODEL
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected
    )


def test_rules_for_every_leaf_of_a_tree_that_can_be_called() -> None:
    got = centralized(MODEL, Model(None, None))
    expected = G - G.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(got.layers[0].weight, expected, atol=1e-6)


def test_a_callable_tree_under_a_mask() -> None:
    mask = jax.tree.map(lambda g: jnp.ndim(g) > 1, MODEL)
    tx = optax.masked(optax_tricks.centralize(ROWS), lambda grads: mask)
    updates, _ = tx.update(MODEL, tx.init(MODEL))
    expected = G - G.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(updates.layers[0].weight, expected, atol=1e-6)
    np.testing.assert_array_equal(updates.layers[0].bias, MODEL.layers[0].bias)


def test_jit_of_a_callable_tree() -> None:
    axes: Callable[..., Any] = ROWS
    got = jax.jit(lambda grads: centralized(grads, axes))(MODEL)
    expected = G - G.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(got.layers[0].weight, expected, atol=1e-6)
