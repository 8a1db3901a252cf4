"""The two forms of sums over trees, of which one is for GPUs."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import optax_tricks
from optax_tricks import _numerics

SHAPES = {
    "small": [(3,), (2, 2), (), (1, 4)],
    "large": [(300, 300), (70_000,), (3, 3, 128, 128)],
    "both": [(3, 3, 3, 64), (64,), (3, 3, 128, 128), (128,), (512, 10)],
    "empty": [(0,), (5,), (3, 0)],
}


def first(w, g):
    return w * g, jnp.square(g), g


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("form", [_numerics._sum_each, _numerics._sum_joined])
def test_sums_are_those_of_numpy(name, form):
    random = np.random.default_rng(0)
    leaves = [
        tuple(random.uniform(0.5, 1.5, shape).astype(np.float32) for _ in range(2))
        for shape in SHAPES[name]
    ]
    arrays = [tuple(map(jnp.asarray, pair)) for pair in leaves]
    got = jax.jit(lambda leaves: form(first, leaves))(arrays)
    expected = [
        sum(np.float64(values[i]).sum() for values in (first(*p) for p in leaves))
        for i in range(3)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 2])
def test_joined_sums_show_what_is_not_finite(bad, place):
    leaves = [[jnp.ones(shape)] for shape in SHAPES["both"]]
    leaves[place][0] = leaves[place][0].at[..., -1].set(bad)
    (total,) = _numerics._sum_joined(_numerics.squares, leaves)
    assert not jnp.isfinite(total)


def test_a_gpu_alone_gets_the_joined_form():
    tree = {"large": jnp.ones((300, 300)), "small": jnp.ones(3)}

    def lowered(platform):
        norms = jax.jit(lambda *trees: optax_tricks.global_norms(*trees))
        return jax.export.export(norms, platforms=[platform])(tree, tree).mlir_module()

    for platform, is_joined in (
        ("cuda", True),
        ("rocm", True),
        ("cpu", False),
        ("tpu", False),
    ):
        text = lowered(platform)
        # One reduction of both trees, or one for each.
        rows = text.count("tensor<300x300xf32>, tensor<300x300xf32>, tensor<f32>")
        assert (rows > 0) is is_joined, platform


@pytest.mark.parametrize(
    "tx",
    [
        optax_tricks.perturbed_unit_step(),
        optax_tricks.barzilai_borwein_step(0.1),
    ],
    ids=["perturbed_unit_step", "barzilai_borwein_step"],
)
def test_small_kernels_of_a_gpu_can_be_merged(tx):
    params = {"scale": jnp.ones(3), "bias": jnp.ones(3)}

    def update(params, state):
        return tx.update(params, state, params, grad_fn=lambda params, step: params)

    def lowered(platform):
        exported = jax.export.export(jax.jit(update), platforms=[platform])
        return exported(params, tx.init(params)).mlir_module()

    for platform, count in (("cuda", 2), ("rocm", 2), ("cpu", 0), ("tpu", 0)):
        barriers = re.findall(
            r"optimization_barrier %\d+ : tensor<2x(?:f32|i1)>", lowered(platform)
        )
        assert len(barriers) == count, platform


def test_global_norms_are_those_of_each_tree():
    trees = [{"a": jnp.full((2, 2), x), "b": jnp.zeros(3)} for x in (1.0, 2.0)]
    assert [float(x) for x in optax_tricks.global_norms(*trees)] == [2.0, 4.0]
    with pytest.raises(ValueError, match="global_norms is defined for real parameters"):
        optax_tricks.global_norms({"a": jnp.ones(2, jnp.complex64)})
    (half,) = optax_tricks.global_norms({"a": jnp.full(4, 300.0, jnp.float16)})
    assert half == 600.0
    assert half.dtype == jnp.float32  # 300 ** 2 is no float16


@pytest.mark.parametrize(
    "other",
    [{"a": jnp.ones(2)}, {"a": jnp.ones(1)}, {"a": jnp.ones(2), "b": jnp.ones(())}],
    ids=["shape", "broadcastable", "a leaf more"],
)
def test_global_norms_of_unequal_trees_are_refused(other):
    tree = {"a": jnp.ones((2, 1))}
    with pytest.raises(ValueError, match=r"equal shapes, got \[\(2, 1\)\] and \["):
        optax_tricks.global_norms(tree, tree, other)
