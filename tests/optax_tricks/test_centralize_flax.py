"""`centralize` on the trees of real Flax modules.

The derivatives of a layer tell which weights feed an output unit: those for which the
derivative of the unit's output is not zero.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_tricks import centralize

pytest.importorskip("flax")
from flax import linen, nnx

Axes = tuple[int, ...]


class Case(NamedTuple):
    """A module, the axes that are averaged over by default, and why.

    `axes` lists every leaf that changes. `layers` gives, for each layer with a kernel,
    the shape of an input and the axes of its output that count the units. Where the
    default is documented to be wrong, `right` holds the axes to give.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    axes: dict[str, Axes]
    why: str
    layers: Mapping[str, tuple[Axes, Axes]] = MappingProxyType({})
    right: Axes | None = None


def conv(*args: Any, **kwargs: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.Conv(*args, rngs=rngs, **kwargs)


LAST, LAST_TWO = (-1,), (-2, -1)
IMAGE = {"": ((2, 4, 4, 4), LAST)}
GATES = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")
KERNEL = "a kernel is (..., in, out)"
ONE_WEIGHT = "one weight feeds a unit: its gradient would vanish"
NORM = "a scale and a bias feed a unit with one weight each"
CASES = {
    "conv-1d": Case(
        conv(2, 4, (3,)), {"kernel": (0, 1)}, KERNEL, {"": ((2, 5, 2), LAST)}
    ),
    "conv-2d": Case(conv(4, 3, (3, 2)), {"kernel": (0, 1, 2)}, KERNEL, IMAGE),
    "conv-3d": Case(
        conv(2, 3, (2, 2, 2)),
        {"kernel": (0, 1, 2, 3)},
        KERNEL,
        {"": ((1, 3, 3, 3, 2), LAST)},
    ),
    "conv-grouped": Case(
        conv(4, 6, (3, 3), feature_group_count=2),
        {"kernel": (0, 1, 2)},
        "the kernel holds only the inputs of a unit's group",
        IMAGE,
    ),
    "conv-depthwise": Case(
        conv(4, 8, (3, 3), feature_group_count=4),
        {"kernel": (0, 1, 2)},
        "one input channel feeds a unit",
        IMAGE,
    ),
    "conv-depthwise-1x1": Case(
        conv(4, 4, (1, 1), feature_group_count=4), {}, ONE_WEIGHT, IMAGE
    ),
    "conv-transpose": Case(
        lambda rngs: nnx.ConvTranspose(4, 3, (3, 3), rngs=rngs),
        {"kernel": (0, 1, 2)},
        "stored as for Conv",
        IMAGE,
    ),
    "conv-transpose-swapped": Case(
        lambda rngs: nnx.ConvTranspose(4, 3, (3, 3), transpose_kernel=True, rngs=rngs),
        {"kernel": (0, 1, 2)},
        "in and out are swapped, which neither name nor shape tells",
        IMAGE,
        right=(0, 1, 3),
    ),
    "linear": Case(
        lambda rngs: nnx.Linear(3, 4, rngs=rngs),
        {"kernel": (0,)},
        KERNEL,
        {"": ((5, 3), LAST)},
    ),
    "linear-one-input": Case(
        lambda rngs: nnx.Linear(1, 4, rngs=rngs), {}, ONE_WEIGHT, {"": ((5, 1), LAST)}
    ),
    "linear-general-inputs": Case(
        lambda rngs: nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), rngs=rngs),
        {"kernel": (0, 1)},
        KERNEL,
        {"": ((5, 3, 2), LAST)},
    ),
    "linear-general-outputs": Case(
        lambda rngs: nnx.LinearGeneral(3, (2, 4), rngs=rngs),
        {"kernel": (0, 1)},
        "the tree does not tell that two axes are outputs",
        {"": ((5, 3), LAST_TWO)},
        right=(0,),
    ),
    "linear-general-batch": Case(
        lambda rngs: nnx.LinearGeneral(3, 4, batch_axis={0: 2}, rngs=rngs),
        {"kernel": (0, 1)},
        "the tree does not tell that an axis counts layers",
        {"": ((2, 5, 3), (0, 2))},
        right=(1,),
    ),
    "einsum": Case(
        lambda rngs: nnx.Einsum("nta,hab->nthb", (2, 3, 4), (2, 1, 4), rngs=rngs),
        {"kernel": (0, 1)},
        "the equation is not in the tree",
        {"": ((2, 5, 3), LAST_TWO)},
        right=(1,),
    ),
    "attention": Case(
        lambda rngs: nnx.MultiHeadAttention(
            num_heads=2, in_features=4, qkv_features=6, normalize_qk=True, rngs=rngs
        ),
        {
            "query/kernel": (0,),
            "key/kernel": (0,),
            "value/kernel": (0,),
            "out/kernel": (0, 1),
        },
        "(in, heads, head_dim) but for out, which is (heads, head_dim, out)",
        {
            "query": ((2, 5, 4), LAST_TWO),
            "key": ((2, 5, 4), LAST_TWO),
            "value": ((2, 5, 4), LAST_TWO),
            "out": ((2, 5, 2, 3), LAST),
        },
    ),
    "embed": Case(
        lambda rngs: nnx.Embed(7, 3, rngs=rngs), {}, "a row is looked up, not summed"
    ),
    "batch-norm": Case(lambda rngs: nnx.BatchNorm(3, rngs=rngs), {}, NORM),
    "layer-norm": Case(lambda rngs: nnx.LayerNorm(3, rngs=rngs), {}, NORM),
    "group-norm": Case(
        lambda rngs: nnx.GroupNorm(4, num_groups=2, rngs=rngs), {}, NORM
    ),
    "lstm": Case(
        lambda rngs: nnx.LSTMCell(3, 4, rngs=rngs),
        {f"{gate}/kernel": (0,) for gate in GATES},
        "each gate is two Linear layers",
        {gate: ((5, 3 if gate[0] == "i" else 4), LAST) for gate in GATES},
    ),
    "gru": Case(
        lambda rngs: nnx.GRUCell(3, 4, rngs=rngs),
        {"dense_i/kernel": (0,), "dense_h/kernel": (0,)},
        "three gates side by side are three times the units",
        {"dense_i": ((5, 3), LAST), "dense_h": ((5, 4), LAST)},
    ),
    "lora": Case(
        lambda rngs: nnx.LoRA(3, 2, 4, rngs=rngs),
        {"lora_a": (0,), "lora_b": (0,)},
        "each factor is the kernel of a Linear layer by another name",
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, without the level of an nnx.Variable."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    return {name.removesuffix("/value"): x for name, x in named.items()}


def abstract(make: Callable[[nnx.Rngs], Any]) -> Any:
    """Makes a module of shapes: drawing its initial weights would take seconds."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def random_like(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def gradient(module: nnx.Module) -> Any:
    kinds = nnx.Any(nnx.Param, nnx.LoRAParam)
    return random_like(nnx.to_pure_dict(nnx.state(module, kinds)))


def apply(tx: optax.GradientTransformation, grads: Any) -> Any:
    return tx.update(grads, tx.init(grads))[0]


def minus_means(grads: dict[str, Any], axes: dict[str, Axes]) -> dict[str, Any]:
    """Subtracts from each leaf in `axes` its mean over them."""
    assert set(axes) <= set(grads)
    return {
        name: g - np.mean(g, axis=axes[name], keepdims=True) if name in axes else g
        for name, g in grads.items()
    }


def minus_unit_means(layer: nnx.Module, shape: Axes, units: Axes, g: Any) -> np.ndarray:
    """Subtracts each unit's mean, where derivatives tell which weights feed a unit."""
    graphdef, params = nnx.split(layer)
    pure = random_like(nnx.to_pure_dict(params))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def outputs(kernel: jax.Array) -> jax.Array:
        """Returns a random combination over examples and places for each unit."""
        y = nnx.merge(graphdef, {**pure, "kernel": kernel})(x)
        y = jnp.moveaxis(y, units, range(len(units)))
        y = y.reshape(int(np.prod(y.shape[: len(units)])), -1)
        return y @ jnp.asarray(rng.normal(size=y.shape[1]), y.dtype)

    feeds = np.asarray(jax.jit(jax.jacrev(outputs))(pure["kernel"])) != 0
    np.testing.assert_array_equal(feeds.sum(0), 1, err_msg="units share a weight")
    assert feeds.any(axis=tuple(range(1, feeds.ndim))).all(), "a unit without weights"
    g = np.array(g)
    for support in feeds:
        if support.sum() > 1:
            g[support] -= g[support].mean()
    return g


def submodule(module: nnx.Module, path: str) -> nnx.Module:
    return getattr(module, path) if path else module


def assert_close(got: Any, expected: Any) -> None:
    got, expected = by_path(got), by_path(expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)


@every_case
def test_axes_by_default(case: Case) -> None:
    grads = gradient(abstract(case.make))
    expected = minus_means(by_path(grads), case.axes)
    assert_close(apply(centralize(), grads), expected)
    for name, g in by_path(apply(centralize(conv_only=True), grads)).items():
        changed = bool(np.any(g != by_path(grads)[name]))
        assert changed == (name in case.axes and g.ndim > 3)


@pytest.mark.parametrize(
    ("case", "path"),
    [
        pytest.param(case, path, id=f"{name}-{path}" if path else name)
        for name, case in CASES.items()
        for path in case.layers
    ],
)
def test_axes_are_those_that_feed_a_unit(case: Case, path: str) -> None:
    module = abstract(case.make)
    grads = gradient(module)
    name = f"{path}/kernel".strip("/")
    layer = submodule(module, path)
    expected = minus_unit_means(layer, *case.layers[path], by_path(grads)[name])
    by_rule = by_path(apply(centralize(), grads))[name]
    if case.right is None:
        np.testing.assert_allclose(by_rule, expected, atol=1e-6)
    else:
        assert np.abs(by_rule - expected).max() > 0.1, case.why
        given = by_path(apply(centralize(case.right), grads))
        np.testing.assert_allclose(given[name], expected, atol=1e-6)
        np.testing.assert_array_equal(given["bias"], by_path(grads)["bias"])


# --- Forms of a tree ------------------------------------------------------------------


class Net(nnx.Module):
    """A network with every kind of name that the rules know, and a list of layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=4, decode=False, rngs=rngs
        )
        self.layers = nnx.List([nnx.Conv(4, 4, (3,), rngs=rngs)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        # Named like the attribute of a Variable.
        self.value = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.attention(self.embed(tokens))
        return self.value(self.norm(jnp.tanh(self.layers[0](x))))


NET_AXES = {
    **{f"attention/{k}": axes for k, axes in CASES["attention"].axes.items()},
    "layers/0/kernel": (0, 1),
    "value/kernel": (0,),
}


def net_loss(net: Net) -> jax.Array:
    tokens = jnp.arange(6).reshape(2, 3) % 5
    return jnp.sum(jnp.square(net(tokens) - 1))


def as_state(net: Net) -> Any:
    grads = jax.eval_shape(nnx.grad(net_loss), net)
    assert isinstance(grads, nnx.State)
    return random_like(grads)


def as_pytree(net: Net) -> Any:
    grads = jax.eval_shape(jax.grad(net_loss), net)
    assert isinstance(grads, Net)
    return random_like(grads)


FORMS = {
    "state": as_state,
    "pure-dict": lambda net: nnx.to_pure_dict(as_state(net)),
    "as-pure": lambda net: nnx.as_pure(as_state(net)),
    "module": as_pytree,
    "linen-dict": lambda net: {"params": nnx.to_pure_dict(as_state(net))},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_a_tree(form: Callable[[Net], Any]) -> None:
    grads = form(abstract(Net))
    got = apply(centralize(), grads)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    named = {name.removeprefix("params/"): g for name, g in by_path(grads).items()}
    expected = minus_means(named, NET_AXES)
    got = {name.removeprefix("params/"): g for name, g in by_path(got).items()}
    assert_close(got, expected)


class LinenNet(linen.Module):
    """A network in the older interface, with a metadata box around a kernel."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(4, (3,))(x)
        x = linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = x + linen.Embed(3, 4)(jnp.array([1]))[None]
        boxed = linen.with_partitioning(linen.initializers.ones, (None, "model"))
        x = linen.LayerNorm()(linen.Dense(4, kernel_init=boxed)(x))
        return linen.ConvTranspose(2, (3,))(x)


LINEN_AXES = {
    **{f"attention/{k}": axes for k, axes in CASES["attention"].axes.items()},
    "Conv_0/kernel": (0, 1),
    "Dense_0/kernel": (0,),
    "ConvTranspose_0/kernel": (0, 1),
}


def test_linen() -> None:
    init = LinenNet().init
    grads = random_like(jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 3, 2))))
    got = apply(centralize(), grads)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    axes = {f"params/{name}": value for name, value in LINEN_AXES.items()}
    assert_close(by_path(got), minus_means(by_path(grads), axes))


# --- Given axes -----------------------------------------------------------------------


class UpNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.up = nnx.ConvTranspose(3, 2, (2, 2), transpose_kernel=True, rngs=rngs)
        self.heads = nnx.LinearGeneral(2, (2, 3), rngs=rngs)


STATE = random_like(nnx.state(abstract(UpNet), nnx.Param))
PURE = nnx.to_pure_dict(STATE)
UP_AXES = {"down/kernel": (0, 1, 2), "up/kernel": (0, 1, 3), "heads/kernel": (0,)}
UP = {"kernel": (0, 1, 3), "bias": ()}


def axes_by_path(grads: Any) -> Any:
    def axes(path: Any, g: jax.Array) -> Axes | None:
        layer = path[0].key
        if g.ndim < 2 or layer == "down":
            return None
        return {"up/kernel": (0, 1, 3), "heads/kernel": (0,), "heads/bias": ()}[
            f"{layer}/{path[1].key}"
        ]

    return jax.tree_util.tree_map_with_path(axes, grads)


OVERRIDES = {
    "tree": (
        {
            "down": {"kernel": (-4, -3, -2), "bias": ()},
            "up": UP,
            "heads": {"kernel": (0,), "bias": ()},
        },
        PURE,
    ),
    "prefix-tree": (
        {"down": None, "up": UP, "heads": {"kernel": (0,), "bias": None}},
        PURE,
    ),
    "prefix-of-a-state": (
        {"down": None, "up": UP, "heads": {"kernel": (0,), "bias": None}},
        STATE,
    ),
    "function-of-a-state": (axes_by_path, STATE),
    "function-of-a-pure-dict": (axes_by_path, PURE),
    "function-to-a-prefix": (
        lambda grads: {
            **dict.fromkeys(grads),
            "up": UP,
            "heads": {"kernel": (0,), "bias": ()},
        },
        PURE,
    ),
}


@pytest.mark.parametrize(("given", "grads"), OVERRIDES.values(), ids=OVERRIDES)
def test_given_axes(given: Any, grads: Any) -> None:
    got = apply(centralize(given), grads)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    assert_close(got, minus_means(by_path(grads), UP_AXES))


def test_a_tuple_for_kernels_of_another_layout() -> None:
    # (out, in, ...) as in PyTorch. The names of biases and scales exempt them.
    grads = {
        "conv": {"kernel": jnp.arange(24.0).reshape(3, 2, 2, 2), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.arange(6.0).reshape(2, 3)},
    }
    got = apply(centralize((1, 2, 3)), grads)
    assert_close(got, minus_means(by_path(grads), {"conv/kernel": (1, 2, 3)}))


@pytest.mark.parametrize("axes", [(0,), {"kernel": (0,)}], ids=["tuple", "tree"])
def test_a_single_weight_is_left_alone_whatever_is_given(axes: Any) -> None:
    grads = {"kernel": jnp.arange(4.0)[None]}
    assert_close(apply(centralize(axes), grads), grads)


# --- Axes that do not fit -------------------------------------------------------------

MISFITS = {
    "too-large": (0, 4),
    "too-small": (-5,),
    "twice": (0, 0),
    "twice-by-another-name": (3, -1),
    "no-tuple": 0,
}


def for_up_kernel(axes: Any) -> Callable[[Any], Any]:
    return lambda grads: jax.tree_util.tree_map_with_path(
        lambda path, g: axes if path[0].key == "up" and g.ndim == 4 else None, grads
    )


@pytest.mark.parametrize("axes", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("grads", [PURE, STATE], ids=["pure-dict", "state"])
def test_axes_that_do_not_fit_name_the_leaf(axes: Any, grads: Any) -> None:
    leaf = r"leaf 'up/kernel(/value)?' of shape \(2, 2, 2, 3\)"
    message = rf"reduction_axes {re.escape(str(axes))} do not fit {leaf}.* -4 to 3"
    with pytest.raises(ValueError, match=message):
        apply(centralize(for_up_kernel(axes)), grads)


# Anything but a tuple of integers is part of the tree, which then lacks this leaf.
@pytest.mark.parametrize("axes", [[0, 1], (0.0, 1.0), {"axes": (0,)}], ids=str)
@pytest.mark.parametrize("grads", [PURE, STATE], ids=["pure-dict", "state"])
def test_anything_but_a_tuple_of_integers_names_the_leaf(axes: Any, grads: Any) -> None:
    leaf = r"leaf 'up/kernel(/value)?' of shape \(2, 2, 2, 3\)"
    message = rf"no entry for {leaf}\. Give a tuple"
    with pytest.raises(ValueError, match=message):
        apply(centralize(for_up_kernel(axes)), grads)


def test_one_tuple_that_does_not_fit_every_leaf_names_the_first() -> None:
    message = r"\(0, 1, 3\) do not fit leaf 'heads/kernel' of shape \(2, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        apply(centralize((0, 1, 3)), PURE)


@pytest.mark.parametrize(
    ("tree", "leaf"),
    [
        ({"down": None, "heads": None}, "'up/bias' of shape (2,)"),
        ([None, None, None], "'down/bias' of shape (3,)"),
        (
            {"down": None, "heads": None, "up": {"bias": ()}},
            "'up/kernel' of shape (2, 2, 2, 3)",
        ),
        ({"down": None, "heads": None, "upp": UP}, "'up/bias' of shape (2,)"),
    ],
    ids=["a-layer-less", "another-container", "a-leaf-less", "misspelt"],
)
def test_a_leaf_without_an_entry_is_named(tree: Any, leaf: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no entry for leaf {leaf}")):
        apply(centralize(tree), PURE)


def test_a_tree_may_have_axes_for_masked_leaves() -> None:
    tree, _ = OVERRIDES["tree"]
    mask = {"down": True, "up": True, "heads": False}
    got = apply(optax.masked(centralize(tree), mask), PURE)
    trained = {k: v for k, v in UP_AXES.items() if not k.startswith("heads")}
    assert_close(got, minus_means(by_path(PURE), trained))
