"""Compares outputs, gradients and running statistics with PyTorch.

The networks in `benchmarks.pytorch` were written from the papers, independently of
`models`.
All tests are skipped if PyTorch is not installed (`pip install --group parity`).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import models
from models._layers import Layers
from models._layout import layout
from models.densenet import DenseNet
from models.duc_hdc import DUCHDC
from models.pix2pix import Generator
from models.preact_resnet import PreActResNet
from models.pspnet import PSPNet
from models.resnet import ResNet
from models.upanet import UPANet
from models.vgg import VGG
from models.vision_transformer import VisionTransformer

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from benchmarks.pytorch import (  # noqa: E402
    NETWORKS,
    classifiers,
    segmenters,
    translators,
    upanet,
)

partial = functools.partial

LAYOUTS = json.loads(Path(__file__).with_name("torch_layouts.json").read_text())
PUBLISHED = {name for networks in LAYOUTS.values() for name in networks}
# Smaller ResNets for the segmentation networks. The second has enough blocks for the
# dilations of both stages to repeat.
segmenters.BLOCKS[20] = (1, 1, 2, 2)
segmenters.BLOCKS[35] = (1, 1, 5, 4)

# Layers that PyTorch's networks number and ours name.
RENAMED = {
    segmenters.PSPNet: {
        "aux_head.": "auxiliary_head.",
        "head.0.": "head.hidden.0.",
        "head.1.": "head.hidden.1.",
        "head.4.": "head.logits.",
    },
    segmenters.DUCHDC: {"duc.0.": "duc."},
}


class NarrowLayers(Layers):
    """Makes VGG's hidden linear layers 16 wide, which saves 100 million weights."""

    def linear(self, inputs, outputs, **options):
        inputs, outputs = (16 if size == 4096 else size for size in (inputs, outputs))
        return super().linear(inputs, outputs, **options)


def narrow_torch_vgg(depth, num_classes):
    network = classifiers.VGG(depth, num_classes)
    network.classifier[0] = torch.nn.Linear(512 * 7 * 7, 16)
    network.classifier[3] = torch.nn.Linear(16, 16)
    network.classifier[6] = torch.nn.Linear(16, num_classes)
    return network


def catalogued(name, shape):
    """Returns the case of a network in its published form."""
    entry = models.describe(name)
    return NETWORKS[name], partial(entry.build, **entry.published), shape


def transformer(network, **options):
    options = {"num_classes": 7, "image_size": 24, "patch_size": 8, **options}
    return (
        partial(network, width=32, depth=2, heads=4, **options),
        partial(VisionTransformer, width=32, depth=2, heads=4, **options),
        (2, 24, 24, 3),
    )


basic, bottleneck = classifiers.BasicBlock, classifiers.Bottleneck
# (function that builds PyTorch's network, function that builds ours from `layers`,
# shape of the images). Networks are small where the reference allows it. Height and
# width differ where they can, so that a mix-up of the two fails.
CASES = {
    "resnet_basic": (
        partial(classifiers.ResNet, basic, (1, 2, 1, 1), num_classes=7),
        partial(ResNet, (1, 2, 1, 1), num_classes=7),
        (2, 48, 64, 3),
    ),
    "resnet_bottleneck": (
        partial(classifiers.ResNet, bottleneck, (2, 1, 1, 1), num_classes=7),
        partial(ResNet, (2, 1, 1, 1), num_classes=7, expansion=4),
        (2, 48, 64, 3),
    ),
    "resnet_cifar": catalogued("resnet18_cifar", (2, 16, 24, 3)),
    "resnet_padded_shortcut": catalogued("resnet20", (2, 16, 24, 3)),
    "resnext_imagenet": (
        partial(
            classifiers.ResNet,
            classifiers.resnext(32, 4),
            (1, 2, 1, 1),
            num_classes=7,
        ),
        partial(ResNet, (1, 2, 1, 1), num_classes=7, width=128, expansion=2, groups=32),
        (2, 48, 64, 3),
    ),
    "resnext_cifar": catalogued("resnext29_2x64d", (2, 8, 12, 3)),
    "preact": catalogued("preact_resnet18", (2, 16, 24, 3)),
    "wide": (
        partial(classifiers.PreActResNet, (2, 1, 1), (32, 64, 128), 16),
        partial(PreActResNet, (2, 1, 1), num_classes=10, stem=16, width=32),
        (2, 16, 24, 3),
    ),
    "vgg_imagenet": (
        partial(narrow_torch_vgg, 11, 7),
        partial(VGG, (1, 1, 2, 2, 2), num_classes=7, small_images=False),
        (2, 96, 288, 3),
    ),
    "vgg_cifar": catalogued("vgg11_bn_cifar", (2, 32, 64, 3)),
    "densenet_imagenet": (
        partial(classifiers.DenseNet, (2, 1, 2, 1), num_classes=7),
        partial(DenseNet, (2, 1, 2, 1), num_classes=7, small_images=False),
        (2, 64, 96, 3),
    ),
    "densenet_cifar": (
        partial(classifiers.DenseNet, (2, 1, 2, 1), imagenet=False, num_classes=7),
        partial(DenseNet, (2, 1, 2, 1), num_classes=7, small_images=True),
        (2, 16, 24, 3),
    ),
    "mobilenet_imagenet": catalogued("mobilenet_v2", (2, 64, 96, 3)),
    "mobilenet_cifar": catalogued("mobilenet_v2_cifar", (2, 16, 24, 3)),
    "upanet": (
        partial(upanet.UPANet, 4, num_classes=7, size=16),
        partial(UPANet, 4, num_classes=7, image_size=16),
        (2, 16, 16, 3),
    ),
    "vit": transformer(classifiers.ViT),
    "deit": transformer(classifiers.DeiT),
    "deit_distilled": transformer(classifiers.DeiT, distilled=True),
    "pspnet": (
        partial(segmenters.PSPNet, 20, 7),
        partial(PSPNet, (1, 1, 2, 2), num_classes=7),
        (2, 32, 56, 3),
    ),
    "duc_hdc": (
        partial(segmenters.DUCHDC, 35, 7, norm_act=False),
        partial(DUCHDC, (1, 1, 5, 4), num_classes=7),
        (2, 64, 96, 3),
    ),
    "unet": catalogued("unet_small", (2, 16, 24, 3)),
    "generator": (
        partial(translators.UNetGenerator, 6),
        partial(Generator, 6),
        (2, 64, 128, 3),
    ),
    "patchgan": catalogued("patchgan70", (2, 32, 48, 6)),
    "patchgan16": catalogued("patchgan16", (2, 16, 24, 6)),
    "pixelgan": catalogued("pixelgan", (2, 8, 12, 6)),
}


def torch_network(make):
    """Returns a network whose parameters and statistics are all random."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, array in network.state_dict().items():
        leaf = name.split(".")[-1]
        if leaf == "num_batches_tracked":
            array.zero_()
        elif leaf == "running_var":
            array.uniform_(0.5, 2.0, generator=generator)
        elif leaf == "weight" and array.ndim == 1:
            array.uniform_(0.5, 1.5, generator=generator)
        elif array.ndim == 1:
            array.normal_(0.0, 0.3, generator=generator)
        else:
            fan_in = array[0].numel()
            array.normal_(0.0, (2 / fan_in) ** 0.5, generator=generator)
    return network


def our_names(network):
    """Returns the arrays of a network by the names in our network."""
    arrays = {}
    for name, array in network.state_dict().items():
        for theirs, ours in RENAMED.get(type(network), {}).items():
            name = name.replace(theirs, ours)
        arrays[name] = array
    return arrays


def blank(make):
    """Returns a network of NaN, which is faster than its initializers."""

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(np.full(x.shape, np.nan, x.dtype))
        # Evaluation does not read the keys and counts of dropout.
        return jax.random.key(0) if x.dtype != jnp.uint32 else jnp.uint32(0)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def both(case, tmp_path, **for_layers):
    """Returns both networks of a case with the same weights, and images."""
    make_theirs, make_ours, shape = CASES[case]
    theirs = torch_network(make_theirs)
    layers = NarrowLayers if case == "vgg_imagenet" else Layers
    ours = blank(lambda: make_ours(layers=layers(rngs=nnx.Rngs(0), **for_layers)))
    path = tmp_path / "weights.safetensors"
    safetensors_torch.save_file(our_names(theirs), path)
    models.load_weights(ours, path)
    path.unlink()
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return theirs, ours, images


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def from_torch(array):
    array = array.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def assert_same(actual, expected, tolerance):
    """Asserts that differences are small relative to the largest entry."""
    assert actual.shape == expected.shape
    largest = np.abs(expected).max()
    assert largest > 0
    assert np.abs(actual - expected).max() <= tolerance * largest


def evaluate(model, images, method="__call__"):
    model = nnx.view(
        model,
        raise_if_not_found=False,
        deterministic=True,
        use_running_average=True,
    )
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda s, x: getattr(nnx.merge(graphdef, s), method)(x))
    return jax.tree.map(np.asarray, forward(state, images))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_pytorch(case, tmp_path):
    theirs, ours, images = both(case, tmp_path)
    with torch.no_grad():
        expected = from_torch(theirs.eval()(to_torch(images)))
    # Outputs depend on the image, or equal outputs would show nothing.
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    # The largest error in float32 is 8e-6. The approximate GELU would give 6e-5.
    assert_same(evaluate(ours, images), expected, 3e-5)


def test_auxiliary_logits_are_those_of_pytorch(tmp_path):
    theirs, ours, images = both("pspnet", tmp_path)
    theirs.eval()
    theirs.training = True  # Returns both outputs, while its layers evaluate.
    with torch.no_grad():
        expected = tuple(map(from_torch, theirs(to_torch(images))))
    actual = evaluate(ours, images, "with_auxiliary")
    for ours_, theirs_ in zip(actual, expected, strict=True):
        assert_same(ours_, theirs_, 3e-5)


# For the others, `test_weights.py` compares with torchvision and timm themselves.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in PUBLISHED])
def test_names_and_shapes_are_those_of_pytorch(name):
    with torch.device("meta"):
        arrays = our_names(NETWORKS[name]())
    expected = {
        name: tuple(array.shape)
        for name, array in arrays.items()
        if not name.endswith("num_batches_tracked")
    }
    options = models.describe(name).published
    ours = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    assert layout(ours, None) == expected


def test_every_class_has_a_case():
    classes = {make.func for _, make, _ in CASES.values()}
    builds = [models.describe(name).build for name in models.names()]
    assert classes == {getattr(build, "func", build) for build in builds}


def our_arrays(model, tmp_path):
    """Returns the arrays of a model by PyTorch's names and in its layout."""
    path = tmp_path / "ours.safetensors"
    models.save_weights(model, path)
    return safetensors.numpy.load_file(path)


@pytest.mark.usefixtures("x64")
def test_training_step_of_resnet_is_that_of_pytorch(tmp_path):
    # Float64 allows a tolerance of 1e-9, which hides no mistake. In float32, rounding
    # switches a few ReLUs, and this alone changes gradients by half a percent.
    theirs, ours, _ = both("resnet_bottleneck", tmp_path, param_dtype=jnp.float64)
    generator = np.random.default_rng(1)
    images = generator.normal(size=(8, 32, 32, 3))
    labels = generator.integers(7, size=8)

    theirs = theirs.double().train()
    before = {name: array.clone() for name, array in theirs.state_dict().items()}
    counts = {}  # For each norm, the number of values in the mean of a channel.
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: counts.update(
                    {name: inputs[0].numel() // module.num_features}
                )
            )
    expected_loss = torch.nn.functional.cross_entropy(
        theirs(to_torch(images)), torch.from_numpy(labels)
    )
    expected_loss.backward()

    graphdef, params, rest = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.BatchStat)

    (loss, statistics), gradients = value_and_grad(params)
    np.testing.assert_allclose(loss, expected_loss.item(), rtol=1e-12)

    nnx.update(ours, gradients, statistics)
    actual = our_arrays(ours, tmp_path)
    for name, parameter in theirs.named_parameters():
        assert_same(actual[name], parameter.grad.numpy(), 1e-9)

    # Our running statistics are in float32.
    after = theirs.state_dict()
    for name, n in counts.items():
        mean, var = f"{name}.running_mean", f"{name}.running_var"
        assert_same(actual[mean], after[mean].numpy(), 1e-6)
        # PyTorch's new batch contributes n / (n - 1) times as much.
        kept = 0.9 * before[var]
        expected = kept + (after[var] - kept) * (n - 1) / n
        assert_same(actual[var], expected.numpy(), 1e-6)
