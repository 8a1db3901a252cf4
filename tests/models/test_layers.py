"""Compares layers and initial values with NumPy, and checks receptive fields."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models._batch_norm import batch_norm
from models._layers import (
    BatchNorm,
    FrozenBatchNorm,
    GroupNorm,
    InstanceNorm,
    Layers,
    UpConv,
    adaptive_average_pool,
    resize,
)
from models.duc_hdc import DUCHDC, pixel_shuffle
from models.pix2pix import Generator
from models.resnet import ResNet
from models.vision_transformer import VisionTransformer


def layers(**options):
    return Layers(rngs=nnx.Rngs(0), **options)


def normal(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def evaluation(model):
    return nnx.view(
        model, use_running_average=True, deterministic=True, raise_if_not_found=False
    )


# Receptive fields.


def seen(function, size, row, column):
    """Returns a mask of the pixels that an output pixel depends on."""
    gradient = jax.jit(jax.grad(lambda x: function(x)[0, row, column].sum()))
    return np.asarray(gradient(jnp.ones((1, *size)))[0] != 0).any(axis=-1)


def window(size, rows, columns):
    inside = np.zeros(size, bool)
    inside[slice(*rows), slice(*columns)] = True
    return inside


def with_positive_weights(model):
    """Makes all weights positive, so that gradients do not cancel."""
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jnp.abs(x) + 1e-3, params))
    return model


@pytest.mark.slow
def test_a_logit_of_patchgan_sees_70_by_70_pixels():
    model = models.create("patchgan70", rngs=nnx.Rngs(0), norm="none", in_channels=1)
    found = seen(with_positive_weights(model), (112, 128, 1), 6, 7)
    # Logits are eight pixels apart, and 23 pixels of padding precede the first.
    expected = window((112, 128), (6 * 8 - 23, 95), (7 * 8 - 23, 103))
    assert expected.sum() == 70 * 70
    np.testing.assert_array_equal(found, expected)


def test_a_logit_of_patchgan16_sees_16_by_16_pixels():
    model = models.create("patchgan16", rngs=nnx.Rngs(0), norm="none", in_channels=1)
    found = seen(with_positive_weights(model), (40, 48, 1), 7, 9)
    # Logits are two pixels apart, and five pixels of padding precede the first.
    expected = window((40, 48), (7 * 2 - 5, 25), (9 * 2 - 5, 29))
    assert expected.sum() == 16 * 16
    np.testing.assert_array_equal(found, expected)


def test_a_logit_of_pixelgan_sees_one_pixel():
    model = models.create("pixelgan", rngs=nnx.Rngs(0), norm="none", in_channels=1)
    found = seen(with_positive_weights(model), (5, 8, 1), 3, 6)
    np.testing.assert_array_equal(found, window((5, 8), (3, 4), (6, 7)))


def dilated(dilations):
    """Returns a sequence of 3x3 convolutions whose kernels are ones."""
    ones = nnx.initializers.ones
    return nnx.Sequential(
        *(layers().conv(1, 1, dilation=d, kernel_init=ones) for d in dilations)
    )


@pytest.mark.parametrize("dilations", [(1, 2, 5, 9), (1, 2, 5, 9, 5, 9, 17)])
def test_hybrid_dilation_sees_every_pixel_of_its_field(dilations):
    radius = sum(dilations)
    size = 2 * radius + 3
    found = seen(dilated(dilations), (size, size, 1), radius + 1, radius + 1)
    np.testing.assert_array_equal(found, window(found.shape, (1, -1), (1, -1)))


def test_one_dilation_repeated_leaves_holes():
    found = seen(dilated((2, 2, 2, 2)), (17, 17, 1), 8, 8)
    expected = np.zeros((17, 17), bool)
    expected[::2, ::2] = True
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_built_network_has_these_dilations():
    model = nnx.eval_shape(
        lambda: models.create("resnet101_duc_hdc", num_classes=2, rngs=nnx.Rngs(0))
    )

    def dilations(stage):
        blocks = getattr(model.backbone, f"layer{stage}")
        assert {block.conv1.kernel_size for block in blocks} == {(1, 1)}
        assert {block.conv2.kernel_size for block in blocks} == {(3, 3)}
        return tuple(block.conv2.kernel_dilation for block in blocks)

    assert dilations(1) == (1, 1, 1)
    assert dilations(2) == (1, 1, 1, 1)
    assert dilations(3) == (*(1, 2, 5, 9) * 5, 1, 2, 5)
    assert dilations(4) == (5, 9, 17)


# Dense upsampling.


def shuffled(x, factor):
    batch, height, width, channels = x.shape
    outputs = channels // factor**2
    result = np.zeros((batch, height * factor, width * factor, outputs), x.dtype)
    for b, y, column, c in np.ndindex(*result.shape):
        within = (y % factor) * factor + column % factor
        channel = c * factor**2 + within
        result[b, y, column, c] = x[b, y // factor, column // factor, channel]
    return result


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_is_that_of_a_loop(factor):
    x = np.asarray(normal(2, 2, 3, 5 * factor**2))
    np.testing.assert_array_equal(pixel_shuffle(x, factor), shuffled(x, factor))


def test_dense_upsampling_is_a_convolution_and_a_shuffle(monkeypatch):
    features = normal(1, 2, 3, 2048)
    monkeypatch.setattr(ResNet, "features", lambda self, images: [features])
    model = nnx.eval_shape(lambda: DUCHDC((1,) * 4, num_classes=2, layers=layers()))
    model.duc = layers().conv(2048, 2 * 64, use_bias=True)
    padded = np.pad(np.asarray(features), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, bias = np.asarray(model.duc.kernel[...]), 0.5
    model.duc.bias[...] = jnp.full(2 * 64, bias)
    cells = np.full((1, 2, 3, 2 * 64), bias)
    for i, j in itertools.product(range(3), repeat=2):
        cells += padded[:, i : i + 2, j : j + 3] @ kernel[i, j]
    logits = model(jnp.zeros((1, 16, 24, 3)))
    np.testing.assert_allclose(logits, shuffled(cells, 8), rtol=1e-3, atol=1e-4)


# Normalization.


def test_batch_norm_is_that_of_pytorch():
    x = 3.0 * normal(4, 2, 3, 5) + 2.0
    norm = BatchNorm(5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = normal(5, key=1), normal(5, key=2)
    found = norm(x)
    values = np.asarray(x, np.float64)
    mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))

    def reference(mean, variance):
        scaled = (values - mean) / np.sqrt(variance + 1e-5)
        return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    np.testing.assert_allclose(found, reference(mean, variance), rtol=1e-4, atol=1e-5)
    # The new batch has weight 0.1. Its variance divides by n, not by n - 1.
    mean, variance = 0.1 * mean, 0.9 + 0.1 * variance
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], variance, rtol=1e-5)
    expected = reference(mean, variance)
    found = evaluation(norm)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def plain_batch_norm(x, scale, bias):
    """Returns what `batch_norm` does, for JAX to differentiate."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, 5)
    mean, var = wide.mean(0), wide.var(0)
    y = (wide - mean[None]) / jnp.sqrt(var + 1e-5)[None] * scale[None] + bias[None]
    return y.reshape(x.shape).astype(x.dtype), mean, var


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float64,
        pytest.param(jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_batch_norm_has_the_gradients_that_jax_derives(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        arrays = 3.0 * normal(4, 2, 3, 5) + 2.0, normal(5, key=1), normal(5, key=2)
        x, scale, bias = (v.astype(dtype) for v in arrays)
        weights = normal(4, 2, 3, 5, key=3).astype(dtype)

        def value(norm, *arguments):
            # The running statistics have gradients too, unlike in a layer.
            y, mean, var = norm(*arguments)
            return (weights * jnp.tanh(y)).sum() + (mean * var).sum()

        def slope(norm, *arguments):
            of_x, of_scale, of_bias = jax.grad(value, (1, 2, 3))(norm, *arguments)
            return (weights * jnp.sin(of_x)).sum() + (of_scale * of_bias).sum()

        ours = functools.partial(batch_norm, eps=1e-5)
        tolerance = {jnp.float32: 1e-4, jnp.float64: 1e-10, jnp.bfloat16: 0.05}[dtype]
        for function in (value, slope):
            pairs = (
                jax.grad(function, (1, 2, 3))(norm, x, scale, bias)
                for norm in (ours, plain_batch_norm)
            )
            for found, expected in zip(*pairs, strict=True):
                assert found.dtype == expected.dtype == dtype
                found, expected = (np.asarray(v, float) for v in (found, expected))
                error = np.abs(found - expected).max() / np.abs(expected).max()
                assert error < tolerance


def test_eps_is_that_of_pytorch():
    # If the variance is far below 1e-5, eps dominates.
    x = 1e-4 * jnp.array([[-1.0], [1.0]]).reshape(2, 1, 1, 1)
    expected = 1e-4 / math.sqrt(1e-8 + 1e-5)
    found = BatchNorm(1, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    found = InstanceNorm(1, rngs=nnx.Rngs(0))(x.reshape(1, 2, 1, 1))
    np.testing.assert_allclose(found[0, 1], [[expected]], rtol=1e-5)
    found = FrozenBatchNorm(1)(jnp.ones((1, 1, 1, 1)))
    np.testing.assert_allclose(found, 1 / math.sqrt(1 + 1e-5), rtol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(BatchNorm, rngs=nnx.Rngs(0)),
        functools.partial(GroupNorm, rngs=nnx.Rngs(0)),
        functools.partial(InstanceNorm, rngs=nnx.Rngs(0)),
        FrozenBatchNorm,
    ],
    ids=["batch", "group", "instance", "frozen_batch"],
)
def test_norms_keep_the_dtype(make):
    x = normal(2, 3, 3, 4).astype(jnp.bfloat16)
    found = make(4)(x)
    assert found.dtype == jnp.bfloat16
    exact = make(4)(x.astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        (1, 1),
        (3, 1),
        (4, 2),
        (16, 8),
        (24, 12),
        (34, 17),
        (64, 32),
        (96, 32),
        (512, 32),
    ],
)
@pytest.mark.slow
def test_group_norm_has_the_most_groups_of_two_up_to_32(channels, groups):
    norm = GroupNorm(channels, rngs=nnx.Rngs(0))
    assert norm.num_groups == groups
    x = normal(2, 2, 3, channels) + 1.0
    values = np.asarray(x, np.float64).reshape(2, 2, 3, groups, channels // groups)
    mean = values.mean((1, 2, 4), keepdims=True)
    variance = values.var((1, 2, 4), keepdims=True)
    expected = ((values - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-3, atol=1e-5)


def test_instance_norm_refuses_a_single_pixel():
    norm = InstanceNorm(4, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(norm))
    with pytest.raises(ValueError, match="single pixel is zero: use larger images"):
        norm(jnp.ones((2, 1, 1, 4)))
    assert norm(jnp.ones((2, 1, 2, 4))).shape == (2, 1, 2, 4)


# Pooling and resizing.


@pytest.mark.parametrize(("size", "bins"), [((7, 5), 3), ((6, 6), 6), ((2, 4), 6)])
def test_adaptive_pooling_is_that_of_a_loop(size, bins):
    x = np.asarray(normal(2, *size, 3))
    expected = np.zeros((2, bins, bins, 3))
    for i, j in itertools.product(range(bins), repeat=2):
        rows, columns = (
            slice(n * side // bins, math.ceil((n + 1) * side / bins))
            for n, side in zip((i, j), size, strict=True)
        )
        expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    found = adaptive_average_pool(x, bins)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def interpolation(size, wanted):
    """Returns weights (wanted, size); pixel centers lie at halves, edges repeat."""
    weights = np.zeros((wanted, size))
    for i in range(wanted):
        place = np.clip((i + 0.5) * size / wanted - 0.5, 0, size - 1)
        below = min(int(place), size - 1)
        above = min(below + 1, size - 1)
        weights[i, below] += 1 - (place - below)
        weights[i, above] += place - below
    return weights


@pytest.mark.parametrize("wanted", [(8, 11), (40, 32), (3, 2), (5, 4), (1, 1)])
def test_resizing_is_bilinear_without_aligned_corner_pixels(wanted):
    x = normal(2, 5, 4, 3)
    rows, columns = map(interpolation, (5, 4), wanted)
    expected = np.einsum("bhwc,ih,jw->bijc", x, rows, columns)
    np.testing.assert_allclose(resize(x, *wanted), expected, rtol=1e-4, atol=1e-5)


# Kernels.


@pytest.mark.parametrize("transposed", [False, True])
def test_standardized_kernels_have_mean_0_and_variance_1(transposed):
    def conv(**options):
        made = layers(**options)
        return (made.conv_transpose if transposed else made.conv)(5, 6, 4)

    standardized, plain = conv(weight_standardization=True), conv()
    standardized.kernel[...] += 0.7
    kernel = np.asarray(standardized.kernel[...])
    each = kernel.reshape(-1, 6)  # One column for each output channel.
    deviation = np.sqrt(each.var(axis=0) + 1e-5)
    plain.kernel[...] = jnp.asarray((kernel - each.mean(axis=0)) / deviation)
    images = normal(2, 5, 6, 5)
    np.testing.assert_allclose(
        standardized(images), plain(images), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 16])
def test_kernels_start_with_the_variance_of_he_for_outputs(groups):
    kernel = layers().conv(64, 256, 3, groups=groups).kernel[...]
    assert kernel.shape == (3, 3, 64 // groups, 256)
    std = math.sqrt(2 / (3 * 3 * 256))
    np.testing.assert_allclose(kernel.std(), std, rtol=0.03)
    assert abs(kernel.mean()) < 0.05 * std


@functools.cache
def generator():
    return Generator(6, layers=layers(), dropout_at_test=False)


@pytest.mark.slow
def test_pix2pix_starts_from_a_normal_of_a_fiftieth():
    for model in (generator(), models.create("patchgan70", rngs=nnx.Rngs(0))):
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Conv | nnx.ConvTranspose):
                kernel = module.kernel[...]
                np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
                assert abs(kernel.mean()) < 0.002
            if isinstance(module, BatchNorm):
                scale = module.scale[...]
                np.testing.assert_allclose(scale.mean(), 1.0, atol=0.01)
                np.testing.assert_allclose(scale.std(), 0.02, rtol=0.5)


# Options.


@pytest.mark.slow
def test_dropout_at_test_makes_a_generator_random():
    images = normal(1, 64, 64, 3)
    silent = evaluation(generator())
    np.testing.assert_array_equal(silent(images), silent(images))
    noisy = Generator(6, layers=layers(), dropout_at_test=True)
    noisy = evaluation(noisy)
    first, second = noisy(images), noisy(images)
    assert float(jnp.abs(first - second).max()) > 1e-3


@pytest.mark.slow
def test_stochastic_depth_leaves_out_whole_branches():
    model = VisionTransformer(
        8,
        2,
        4,
        num_classes=2,
        layers=layers(),
        image_size=8,
        patch_size=4,
        stochastic_depth=0.6,
    )
    rates = [block.drop_path.rate for block in model.blocks]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.6])
    block, tokens = model.blocks[-1], normal(400, 5, 8)
    full = evaluation(block)
    attended = full.attn(full.norm1(tokens))
    block.mlp = lambda x: 0.0 * x
    added = np.asarray(block(tokens) - tokens)
    left_out = (added == 0).all(axis=(1, 2))
    assert 0.5 < left_out.mean() < 0.7
    # Branches that are kept are scaled up.
    kept = np.asarray(attended)[~left_out] / 0.4
    np.testing.assert_allclose(added[~left_out], kept, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("expansion", [1, 4])
def test_zero_init_makes_residual_blocks_start_as_the_identity(norm, expansion):
    def first_block(**options):
        model = ResNet(
            (1,),
            num_classes=2,
            layers=layers(norm=norm),
            width=64 // expansion,
            expansion=expansion,
            stem=3,
            **options,
        )
        return model.layer1[0]

    x = normal(2, 4, 4, 64)
    block = first_block(zero_init_last_norm=True)
    np.testing.assert_array_equal(block(x), nnx.relu(x))
    assert float(jnp.abs(first_block()(x) - nnx.relu(x)).max()) > 0.1


@pytest.mark.parametrize("kernel_size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}])
def test_doubling_convolution_is_flax_transposed_convolution(kernel_size, options):
    ours = UpConv(3, 5, kernel_size, rngs=nnx.Rngs(0), **options)
    ours.bias[...] = jnp.arange(5.0)
    theirs = nnx.ConvTranspose(
        3, 5, (kernel_size, kernel_size), strides=2, rngs=nnx.Rngs(1), **options
    )
    nnx.update(theirs, nnx.state(ours))
    images = jax.random.normal(jax.random.key(0), (2, 3, 4, 3))
    outputs, expected = ours(images), theirs(images)
    assert outputs.shape == (2, 6, 8, 5)
    assert outputs.dtype == expected.dtype
    tolerance = 1e-5 if not options else 0.05
    np.testing.assert_allclose(
        outputs.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance
    )


def test_doubling_convolution_has_kernels_of_two_sizes():
    with pytest.raises(ValueError, match="must be 2 or 4, got 3"):
        UpConv(1, 1, 3, rngs=nnx.Rngs(0))
