"""Trains a small form of every class of network for a step."""

import functools
import re
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models._layers import BatchNorm, FrozenBatchNorm, GroupNorm, Layers
from models.densenet import DenseNet
from models.duc_hdc import DUCHDC
from models.mobilenet import MobileNetV2
from models.pix2pix import Discriminator, Generator
from models.preact_resnet import PreActResNet
from models.pspnet import PSPNet
from models.resnet import ResNet
from models.unet import UNet
from models.upanet import UPANet
from models.vgg import VGG
from models.vision_transformer import VisionTransformer

partial = functools.partial

# (function that builds the network from `layers`, shape of the images)
FORMS = {
    "basic": (
        partial(ResNet, (1, 2), num_classes=5, width=16, stem=3, padded_shortcut=True),
        (4, 8, 8, 3),
    ),
    "bottleneck": (
        partial(ResNet, (2, 1), num_classes=5, width=8, expansion=4, groups=2),
        (4, 32, 32, 3),
    ),
    "preact": (
        partial(PreActResNet, (1, 1), num_classes=5, stem=4, width=8),
        (4, 8, 8, 3),
    ),
    "vgg": (
        partial(VGG, (1, 1, 1, 1, 1), num_classes=5, small_images=True),
        (4, 32, 32, 3),
    ),
    "densenet": (
        partial(DenseNet, (2, 2), num_classes=5, growth=8, small_images=False),
        (4, 32, 32, 3),
    ),
    "mobilenet": (
        partial(MobileNetV2, num_classes=5, small_images=False),
        (4, 32, 32, 3),
    ),
    "upanet": (
        partial(UPANet, 4, num_classes=5, dense_blocks=1, image_size=8),
        (4, 8, 8, 3),
    ),
    "transformer": (
        partial(
            VisionTransformer,
            16,
            2,
            2,
            num_classes=5,
            image_size=8,
            patch_size=4,
            stochastic_depth=0.5,
            distilled=True,
            init="truncated",
        ),
        (4, 8, 8, 3),
    ),
    "pspnet": (partial(PSPNet, (1, 1, 1, 1), num_classes=5), (2, 16, 16, 3)),
    "duc": (partial(DUCHDC, (1, 1, 1, 1), num_classes=5), (2, 16, 16, 3)),
    "unet": (partial(UNet, num_classes=5), (2, 16, 16, 3)),
    "generator": (partial(Generator, 6), (2, 64, 64, 3)),
    "discriminator": (
        partial(Discriminator, (8, 16), (2, 2, 1), 4, last_bias=True),
        (2, 24, 24, 6),
    ),
}
CONVOLUTIONAL = [name for name in FORMS if name != "transformer"]
WITH_REMAT = [
    name for name in FORMS if name not in ("vgg", "unet", "generator", "discriminator")
]
# Forms with BatchNorm or dropout that stand for all in tests that compile again.
COMPILED_AGAIN = ["basic", "densenet", "transformer"]


def test_every_class_has_a_small_form():
    classes = {make.func for make, _ in FORMS.values()}
    builds = [models.describe(name).build for name in models.names()]
    assert classes == {getattr(build, "func", build) for build in builds}


def build(form, key=0, *, remat=None, **for_layers):
    network, _ = FORMS[form]
    own = {} if remat is None else {"remat": remat}
    return network(layers=Layers(rngs=nnx.Rngs(key), **for_layers), **own)


def abstract(form, **options):
    return nnx.eval_shape(lambda: build(form, **options))


@functools.cache
def make(form, key=0, **options):
    """Returns the graph definition, the parameters and the other state of a network."""
    return parts(build(form, key, **options))


def parts(model):
    graphdef, params, state = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def images_for(form, key=0):
    return jax.random.normal(jax.random.key(key), FORMS[form][1])


def loss_and_state(graphdef, params, state, images):
    """Returns the mean squared distance to fixed random targets, and the new state."""
    model = nnx.merge(graphdef, params, state)
    outputs, auxiliary = model.with_auxiliary(images)
    if auxiliary is not None:
        outputs = jnp.stack((outputs, auxiliary))
    targets = jax.random.normal(jax.random.key(7), outputs.shape)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    return ((outputs - targets) ** 2).mean(), state


@partial(jax.jit, static_argnums=0)
def gradient(graphdef, params, state, images):
    function = partial(loss_and_state, graphdef)
    return jax.value_and_grad(function, has_aux=True)(params, state, images)


def evaluate(graphdef, params, state, images):
    model = nnx.view(
        nnx.merge(graphdef, params, state),
        use_running_average=True,
        deterministic=True,
        raise_if_not_found=False,
    )
    return model(images), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def assert_close(found, expected, tolerance=2e-5):
    """Asserts that arrays agree up to float32 rounding of their largest entry."""
    leaves = zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    )
    for (path, leaf), other in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert bool((leaf == other).all())
            continue
        # Some gradients consist of rounding errors only.
        scale = float(jnp.abs(leaf).max()) + 1e-2
        difference = float(jnp.abs(leaf - other).max())
        assert difference <= tolerance * scale, (path, difference, scale)


def all_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_one_step_along_the_gradient_reduces_the_loss(form):
    graphdef, params, state = make(form)
    images = images_for(form)
    (before, changed), grads = gradient(graphdef, params, state, images)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    squares = sum((g**2).sum() for g in jax.tree.leaves(grads))
    # To first order, this step reduces the loss by a hundredth.
    rate = 0.01 * before / squares
    stepped = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    (after, _), _ = gradient(graphdef, stepped, state, images)
    # The dropout keys are the same, because the state is that of the first forward.
    assert 0.985 * before < after < 0.995 * before
    # New parameters and a new state do not compile again.
    traces = gradient._cache_size()
    gradient(graphdef, stepped, changed, images)
    assert gradient._cache_size() == traces


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_training_and_evaluation_differ_only_as_they_should(form):
    graphdef, params, state = make(form)
    images = images_for(form) + 1.0
    forward = jax.jit(lambda *a: evaluate(graphdef, *a))
    once, kept = forward(params, state, images)
    again, _ = forward(params, state, images)
    assert all_equal(once, again)
    assert all_equal(kept, state)
    # The output of an image does not depend on the rest of the batch.
    alone, _ = forward(params, state, images[:1].repeat(len(images), axis=0))
    np.testing.assert_allclose(alone[0], once[0], rtol=1e-4, atol=1e-5)
    (_, changed), _ = gradient(graphdef, params, state, images)
    for path, value in jax.tree.leaves_with_path(changed):
        names = [key.key for key in path]
        assert names[-1] in ("mean", "var", "count", "key")
        # A transformer never skips its first block, so it draws no keys there.
        never_drawn = form == "transformer" and names[:2] == ["blocks", 0]
        same = bool((value == look_up(state, path)).all())
        assert same == (names[-1] == "key" or never_drawn), path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32(form):
    graphdef, params, state = parts(abstract(form, dtype=jnp.bfloat16))
    images = images_for(form)
    function = partial(loss_and_state, graphdef)
    step = jax.value_and_grad(function, has_aux=True)
    (loss, changed), grads = jax.eval_shape(step, params, state, images)
    for leaf in jax.tree.leaves((params, loss, grads, changed)):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert leaf.dtype in (jnp.float32, jnp.uint32)
    outputs, _ = jax.eval_shape(partial(evaluate, graphdef), params, state, images)
    assert outputs.dtype == jnp.float32


@pytest.mark.parametrize("form", COMPILED_AGAIN)
@pytest.mark.slow
def test_bfloat16_is_close_to_float32(form):
    graphdef, params, state = make(form, dtype=jnp.bfloat16)
    images = images_for(form)
    (loss, _), grads = gradient(graphdef, params, state, images)
    exact_graphdef, *_ = make(form)
    (exact, _), _ = gradient(exact_graphdef, params, state, images)
    np.testing.assert_allclose(loss, exact, rtol=0.02)
    assert loss != exact
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("form", CONVOLUTIONAL)
def test_convolutions_compute_in_bfloat16(form):
    graphdef, params, state = parts(abstract(form, dtype=jnp.bfloat16))
    function = jax.jit(partial(evaluate, graphdef))
    export = jax.export.export(function, platforms=["tpu"])
    program = export(params, state, images_for(form)).mlir_module()
    dtypes = re.findall(r"stablehlo\.convolution.*-> tensor<[0-9x]+x(\w+)>", program)
    # If a network ends with a convolution, this one returns float32.
    assert dtypes
    assert all(dtype == "bf16" for dtype in dtypes[:-1])
    assert len(dtypes) > 3 or form == "discriminator"


@pytest.mark.slow
@pytest.mark.parametrize("form", WITH_REMAT)
def test_remat_is_part_of_the_computation(form):
    graphdef, params, state = parts(abstract(form, remat=True))
    function = partial(loss_and_state, graphdef)
    jaxpr = jax.make_jaxpr(function)(params, state, images_for(form))
    assert any(eqn.primitive.name == "remat2" for eqn in jaxpr.eqns)


@pytest.mark.parametrize("form", COMPILED_AGAIN)
@pytest.mark.slow
def test_remat_gives_the_same_gradients_and_statistics(form):
    graphdef, params, state = make(form)
    images = images_for(form)
    (loss, changed), grads = gradient(graphdef, params, state, images)
    again, *_ = make(form, remat=True)
    (loss_again, changed_again), grads_again = gradient(again, params, state, images)
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    assert_close((changed_again, grads_again), (changed, grads))


@pytest.mark.parametrize("form", COMPILED_AGAIN)
@pytest.mark.slow
def test_vmap_over_two_seeds_equals_two_runs(form):
    graphdef, *_ = make(form)
    images = images_for(form)
    runs = [make(form, key=key)[1:] for key in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    (losses, states), grads = jax.vmap(gradient, in_axes=(None, 0, 0, None))(
        graphdef, *stacked, images
    )
    for i, run in enumerate(runs):
        (loss, state), grad = gradient(graphdef, *run, images)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5)
        together = jax.tree.map(lambda leaf, i=i: leaf[i], (states, grads))
        assert_close(together, (state, grad))
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_keys_of_parameters_may_be_traced():
    def first_kernel(key):
        return build("basic", key=key).conv1.kernel[...]

    keys = jax.random.split(jax.random.key(3), 2)
    together = jax.vmap(first_kernel)(keys)
    for key, kernel in zip(keys, together, strict=True):
        np.testing.assert_allclose(first_kernel(key), kernel, rtol=1e-6)


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def modules(model, *kinds):
    return [
        module for _, module in nnx.iter_modules(model) if isinstance(module, kinds)
    ]


@pytest.mark.parametrize("form", CONVOLUTIONAL)
def test_group_norm_takes_the_place_of_batch_norm(form):
    batch, group = abstract(form), abstract(form, norm="group")
    assert len(modules(group, GroupNorm)) == len(modules(batch, BatchNorm)) > 0
    assert not modules(group, BatchNorm)
    assert count(group) == count(batch)
    assert not jax.tree.leaves(nnx.state(group, nnx.BatchStat))


@pytest.mark.parametrize("form", CONVOLUTIONAL)
def test_frozen_batch_norm_has_nothing_to_train(form):
    batch, frozen = abstract(form), abstract(form, norm="frozen_batch")
    norms = modules(batch, BatchNorm)
    assert len(modules(frozen, FrozenBatchNorm)) == len(norms)
    assert count(frozen) == count(batch) - sum(2 * n.num_features for n in norms)


@pytest.mark.parametrize("form", CONVOLUTIONAL)
def test_without_norm_convolutions_have_a_bias(form):
    model = abstract(form, norm="none")
    assert not modules(model, BatchNorm, GroupNorm, FrozenBatchNorm)
    convolutions = modules(model, nnx.Conv, nnx.ConvTranspose)
    assert all(conv.bias is not None for conv in convolutions)


@pytest.mark.parametrize("form", CONVOLUTIONAL)
def test_weight_standardization_is_of_all_convolutions_but_the_last(form):
    def promotions(model):
        return [c.promote_dtype for c in modules(model, nnx.Conv, nnx.ConvTranspose)]

    plain = promotions(abstract(form))
    standardized = promotions(abstract(form, weight_standardization=True))
    kept = [a is b for a, b in zip(plain, standardized, strict=True)]
    # PSPNet has two last convolutions. Classifiers end with a linear layer.
    ends = {"pspnet": 2, "duc": 1, "unet": 1, "generator": 1, "discriminator": 1}
    assert sum(kept) == ends.get(form, 0)


@pytest.mark.parametrize("form", ["basic", "densenet", "unet"])
@pytest.mark.slow
def test_frozen_batch_norm_is_batch_norm_in_evaluation(form):
    images = images_for(form)
    graphdef, params, state = make(form)
    # Change statistics and scales from their initial values.
    _, state = loss_and_state(graphdef, params, state, images)
    params = jax.tree.map(lambda x: x + 0.1, params)
    expected, _ = evaluate(graphdef, params, state, images)
    frozen_graphdef, *frozen = make(form, norm="frozen_batch")
    frozen_params, frozen_state = (
        jax.tree_util.tree_map_with_path(
            lambda path, _: look_up(params, path, look_up(state, path)), tree
        )
        for tree in frozen
    )
    outputs, kept = evaluate(frozen_graphdef, frozen_params, frozen_state, images)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    _, trained = loss_and_state(frozen_graphdef, frozen_params, frozen_state, images)
    assert all_equal(kept, frozen_state)
    assert all_equal(trained, frozen_state)


def look_up(tree, path, default=None):
    for key in path:
        if not isinstance(tree, dict) or key.key not in tree:
            return default
        tree = tree[key.key]
    return tree


@pytest.mark.skipif(
    metadata.version("jaxlib").startswith("0.10."), reason="it drops the barriers"
)
def test_no_residual_block_computes_the_sum_of_those_before_it():
    def flops(blocks):
        network = partial(ResNet, (blocks,), num_classes=5, width=16, stem=3)
        model = nnx.eval_shape(lambda: network(layers=Layers(rngs=nnx.Rngs(0))))
        graphdef, state = nnx.split(model)
        gradient = jax.grad(lambda state, x: nnx.merge(graphdef, state)(x).sum())
        images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        compiled = jax.jit(gradient).lower(state, images).compile()
        return compiled.cost_analysis()["flops"]

    few, more, most = map(flops, (4, 8, 12))
    assert most - more == more - few
