"""Compares every form of the convolution, and of max pooling, with XLA's own.

The reference is `jax.lax.conv_general_dilated` in float64, and its gradients.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models._convolution import conv_general_dilated, max_pool

# (images, kernels, strides, padding, dilation, groups): every form on CPUs, each with
# strides, padding on some sides, dilation, and height unlike width where it has them.
NONE = ((0, 0), (0, 0))
ONE = ((1, 1), (1, 1))
CONVOLUTIONS = {
    "3x3": ((3, 8, 7, 4), (3, 3, 4, 5), 1, ONE, 1, 1),
    "3x3, tiles": ((3, 27, 26, 64), (3, 3, 64, 66), 1, ((0, 1), (2, 1)), 1, 1),
    "3x3, bands of tiles": ((1, 127, 128, 64), (3, 3, 64, 66), 1, ONE, 1, 1),
    "groups, tiles": ((3, 26, 27, 128), (3, 3, 64, 132), 1, ONE, 1, 2),
    "3x3, bands": ((8, 40, 70, 2), (3, 3, 2, 16), 1, ONE, 1, 1),
    "strided, bands": (
        (16, 67, 30, 2),
        (3, 2, 2, 32),
        (2, 1),
        ((2, 1), (1, 0)),
        (2, 1),
        1,
    ),
    "bands, last one shorter": (
        (16, 35, 40, 2),
        (3, 3, 2, 32),
        (2, 1),
        ((0, 1), (1, 1)),
        1,
        1,
    ),
    "bands of one row": ((50, 3, 100, 2), (3, 3, 2, 64), 1, ONE, 1, 1),
    "5x3": ((3, 8, 7, 4), (5, 3, 4, 5), 1, ((2, 2), (1, 1)), 1, 1),
    "no padding": ((3, 8, 7, 4), (3, 3, 4, 5), 1, NONE, 1, 1),
    "uneven padding": ((3, 8, 7, 4), (3, 3, 4, 5), 1, ((2, 0), (0, 3)), 1, 1),
    "wide padding": ((3, 8, 7, 4), (3, 3, 4, 5), 1, ((4, 4), (3, 3)), 1, 1),
    "dilated": ((3, 9, 8, 4), (3, 3, 4, 5), 1, ((2, 2), (3, 3)), (2, 3), 1),
    "strided": ((12, 8, 7, 4), (3, 3, 4, 5), 2, ONE, 1, 1),
    "strided, deep": ((12, 8, 7, 130), (3, 3, 130, 2), 2, ((1, 0), (0, 1)), 1, 1),
    "strided, large": ((1, 40, 37, 2), (4, 4, 2, 3), 2, ONE, 1, 1),
    "strided, last pixels unseen": (
        (2, 40, 38, 2),
        (3, 3, 2, 3),
        (3, 2),
        ((0, 0), (0, 1)),
        (2, 1),
        1,
    ),
    "2x2 pixels": ((40, 2, 2, 4), (3, 3, 4, 5), 1, ONE, 1, 1),
    "one pixel": ((200, 1, 1, 4), (3, 3, 4, 5), 1, ONE, 1, 1),
    "one image": ((1, 9, 8, 4), (3, 3, 4, 5), (2, 1), ((1, 2), (0, 1)), (2, 1), 1),
    "no overlap": ((20, 13, 12, 3), (4, 3, 3, 5), (4, 3), NONE, 1, 1),
    "few outputs": (
        (3, 17, 15, 40),
        (4, 3, 40, 3),
        1,
        ((1, 2), (2, 0)),
        (1, 2),
        1,
    ),
    "groups, few outputs": ((3, 9, 14, 32), (2, 3, 16, 8), 1, ONE, 1, 2),
    "large kernel": ((17, 8, 6, 64), (4, 4, 64, 256), 2, ((1, 2), (0, 1)), 1, 1),
    "large kernel, dilated": (
        (6, 7, 9, 128),
        (3, 3, 128, 256),
        (1, 2),
        ((2, 1), (3, 3)),
        (2, 3),
        1,
    ),
    "1x1": ((3, 8, 6, 4), (1, 1, 4, 5), 1, NONE, 1, 1),
    "1x1, strided": ((3, 8, 7, 4), (1, 1, 4, 5), (2, 3), NONE, 1, 1),
    "1x1, padded": ((3, 8, 7, 4), (1, 1, 4, 5), 1, ((1, 2), (0, 1)), 1, 1),
    "depthwise": ((3, 8, 6, 4), (3, 3, 1, 4), 1, ONE, 1, 4),
    "depthwise, strided": (
        (3, 9, 6, 4),
        (3, 2, 1, 4),
        (2, 3),
        ((1, 0), (2, 1)),
        (1, 2),
        4,
    ),
    "depthwise, two outputs each": ((3, 8, 7, 4), (3, 3, 1, 8), 1, ONE, 1, 4),
    "6 groups": ((3, 8, 7, 12), (3, 3, 2, 18), 1, ONE, 1, 6),
    "groups, strided": ((8, 9, 8, 34), (3, 3, 17, 6), 2, ONE, 1, 2),
    "groups, 1x1": ((9, 4, 4, 36), (1, 1, 6, 12), (2, 1), NONE, 1, 6),
    "groups, 2x2 pixels": ((40, 2, 2, 40), (3, 3, 10, 8), 1, ONE, (1, 1), 4),
}


def functions(case):
    """Returns our convolution, XLA's, and random arguments in float64."""
    images, kernel, strides, padding, dilation, groups = CONVOLUTIONS[case]
    options = {
        "window_strides": (strides, strides) if strides in (1, 2) else strides,
        "padding": padding,
        "rhs_dilation": (1, 1) if dilation == 1 else dilation,
        "feature_group_count": groups,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    random = np.random.default_rng(0)
    return (
        functools.partial(conv_general_dilated, **options),
        functools.partial(lax.conv_general_dilated, **options),
        random.normal(size=images),
        random.normal(size=kernel),
    )


def value_and_gradients(function, x, kernel):
    y, pull_back = jax.vjp(function, x, kernel)
    # Another weight for each output, since a gradient may mix them up.
    weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    return y, pull_back(weights.astype(y.dtype))


def second_derivatives(function, x, kernel):
    """Returns products with a Hessian, forward over reverse and twice reverse."""

    def gradients(*arguments):
        return jax.grad(lambda *args: jnp.sin(function(*args)).sum(), (0, 1))(
            *arguments
        )

    def square(*arguments):
        return sum(jnp.vdot(g, g) for g in gradients(*arguments))

    tangents = (jnp.cos(x), jnp.sin(kernel))
    _, products = jax.jvp(gradients, (x, kernel), tangents)
    return products, jax.grad(square, (0, 1))(x, kernel)


def assert_close(found, expected, atol, rtol=0):
    """Compares arrays; `atol` is relative to the largest entry of an array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * np.abs(b).max())


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_value_and_gradients_equal_those_of_xla(case, x64):
    ours, theirs, *arguments = functions(case)
    found = jax.jit(functools.partial(value_and_gradients, ours))(*arguments)
    expected = value_and_gradients(theirs, *arguments)
    assert_close(found, expected, 1e-13)


ONE_OF_EACH_FORM = (
    "3x3, tiles",
    "3x3, bands of tiles",
    "3x3, bands",
    "strided",
    "strided, deep",
    "2x2 pixels",
    "few outputs",
    "1x1, strided",
    "depthwise",
    "6 groups",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_OF_EACH_FORM)
def test_second_derivatives_equal_those_of_xla(case, x64):
    ours, theirs, *arguments = functions(case)
    found = second_derivatives(ours, *arguments)
    assert_close(found, second_derivatives(theirs, *arguments), 1e-13)


# (dtype, error of its rounding relative to each entry)
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 0), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("case", ONE_OF_EACH_FORM)
def test_other_dtypes_are_rounded_once(case, dtype, rounding, x64):
    ours, theirs, *arguments = functions(case)
    arguments = [jnp.asarray(argument, dtype) for argument in arguments]
    found = jax.jit(functools.partial(value_and_gradients, ours))(*arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    y, pull_back = jax.vjp(theirs, *(a.astype(jnp.float64) for a in arguments))
    weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(dtype)
    expected = y, pull_back(weights.astype(y.dtype))
    assert_close(found, expected, 1e-6, rounding)


@pytest.mark.parametrize("case", ["3x3", "3x3, tiles", "depthwise"])
def test_several_networks_at_once(case):
    ours, _, x, kernel = functions(case)
    networks = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    found = jax.vmap(functools.partial(value_and_gradients, ours))(*networks)
    one_by_one = [
        value_and_gradients(ours, *arguments)
        for arguments in zip(*networks, strict=True)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    assert_close(found, expected, 1e-5)


def optimized(function, *arguments):
    """Returns the program that XLA makes for CPUs, as text."""
    return jax.jit(function).lower(*arguments).compile().as_text()


SLOW_ON_CPUS = {
    "transposed layout": re.compile(r"dim_labels=(?!b01f_01io->b01f)"),
    "groups": re.compile(r"feature_group_count|batch_group_count"),
    "pooling": re.compile("select-and-scatter"),
}


# XLA exchanges images and kernels where the result is larger than the images. No
# network has such a convolution.
NOT_LARGER = [
    case
    for case in CONVOLUTIONS
    if case not in ("uneven padding", "wide padding", "1x1, padded")
]


@pytest.mark.parametrize("case", NOT_LARGER)
def test_form_on_cpus_is_fast_in_a_loop(case):
    ours, _, x, kernel = functions(case)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)

    def repeated(x, kernel):
        def body(kernel, _):
            _, (dx, dkernel) = value_and_gradients(ours, x, kernel)
            return kernel - dkernel, dx

        return lax.scan(body, kernel, length=3)

    text = optimized(repeated, x, kernel)
    assert "while" in text
    assert not [name for name, form in SLOW_ON_CPUS.items() if form.search(text)]


WITHOUT_CONVOLUTIONS = (
    "3x3, tiles",
    "3x3, bands of tiles",
    "groups, tiles",
    "few outputs",
    "groups, few outputs",
    "large kernel",
    "large kernel, dilated",
)


@pytest.mark.parametrize("case", WITHOUT_CONVOLUTIONS)
def test_forms_take_the_place_of_convolutions(case):
    ours, theirs, x, kernel = functions(case)
    for function, expected in ((ours, 0), (theirs, 3)):
        text = optimized(functools.partial(value_and_gradients, function), x, kernel)
        assert text.count(" convolution(") == expected


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_other_platforms_get_the_operation_of_xla(case, platform):
    ours, theirs, *arguments = functions(case)
    found, expected = (
        jax.export.export(
            jax.jit(functools.partial(value_and_gradients, function)),
            platforms=[platform],
        )(*arguments).mlir_module()
        for function in (ours, theirs)
    )
    operations = re.compile(r"stablehlo\.(convolution|dot_general|slice|concatenate).*")
    assert len(operations.findall(expected)) == 3
    assert operations.findall(found) == operations.findall(expected)


# (images, size of windows, stride, padding)
POOLS = {
    "2x2": ((2, 6, 8, 3), 2, 2, 0),
    "2x2, last pixels unseen": ((2, 7, 9, 3), 2, 2, 0),
    "3x3, stride 2": ((2, 8, 9, 3), 3, 2, 1),
    "3x3, stride 1": ((2, 5, 4, 3), 3, 1, 1),
    "2x2, stride 3": ((2, 8, 7, 3), 2, 3, 0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool_and_gradient_equal_those_of_xla(pool, dtype, x64):
    shape, size, stride, padding = POOLS[pool]
    # Few values, so that most windows have several maxima.
    x = np.random.default_rng(0).integers(-2, 2, shape)
    sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]

    def theirs(x):
        windows, strides = (1, size, size, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, windows, strides, sides)

    def value_and_gradient(function, x):
        y, pull_back = jax.vjp(function, x)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(dtype)
        return y, pull_back(weights.astype(y.dtype))[0]

    x = jnp.asarray(x, dtype)
    found = value_and_gradient(lambda x: max_pool(x, size, stride, padding), x)
    assert found[0].dtype == found[1].dtype == dtype
    rounding = 2**-8 if dtype == "bfloat16" else 0
    expected = value_and_gradient(theirs, x.astype(jnp.float64))
    assert_close(found, expected, 1e-6, rounding)
    assert not SLOW_ON_CPUS["pooling"].search(
        optimized(jax.grad(lambda x: max_pool(x, size, stride, padding).sum()), x)
    )


def test_max_pool_gives_the_gradient_to_the_first_of_equal_pixels():
    x = jnp.zeros((1, 2, 2, 1)).at[0, :, :, 0].set(jnp.array([[1.0, 2], [2, 2]]))
    gradient = jax.grad(lambda x: max_pool(x, 2, 2).sum())(x)
    assert gradient[0, :, :, 0].tolist() == [[0, 1], [0, 0]]
