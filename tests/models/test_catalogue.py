"""Tests that every network of the catalogue must pass."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import models
from models._layers import Layers


@functools.cache
def abstract(name, **options):
    """Returns a network of shapes without arrays."""
    entry = models.describe(name)
    options = {**entry.published, **options}
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))


def network_class(name):
    build = models.describe(name).build
    return getattr(build, "func", build)


# The first network of each class stands for its deeper forms.
FIRST = list({network_class(name): name for name in models.names()[::-1]}.values())

# The deeper forms of a class are left to the slow tests.
EACH = [
    pytest.param(name, marks=() if name in FIRST else pytest.mark.slow)
    for name in models.names()
]

CLASSIFIERS = [name for name in FIRST if name in models.names(task="classification")]


def output(model, shape, method="__call__"):
    """Returns the output for images of a shape, without computing it."""
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(
        lambda s, x: getattr(nnx.merge(graphdef, s), method)(x), state, images
    )


def output_shape(model, shape):
    return output(model, shape).shape


def shapes(model):
    """Returns the shapes of all parameters by dotted path."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.shape for path, variable in params}


@pytest.mark.parametrize("name", EACH)
def test_parameter_count_is_the_published_one(name):
    params = nnx.state(abstract(name), nnx.Param)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == models.describe(name).num_parameters


@pytest.mark.parametrize("name", EACH)
def test_every_network_states_its_parts(name):
    entry, model = models.describe(name), abstract(name)
    assert isinstance(model, models.Network)
    assert bool(model.head_paths) == (entry.task == "classification")
    paths = shapes(model)
    for head in model.head_paths:
        assert any(path.startswith(f"{head}.") for path in paths)
    if model.backbone is None:
        assert not any(path.startswith("backbone.") for path in paths)
    else:
        assert isinstance(model.backbone, models.Network)
        assert any(path.startswith("backbone.") for path in paths)
        # A backbone has no head, but names the one in the file of a classifier.
        assert model.backbone.head_paths
        heads = tuple(f"{head}." for head in model.backbone.head_paths)
        assert not any(path.startswith(heads) for path in shapes(model.backbone))


@pytest.mark.slow
def test_dilated_networks_have_a_backbone():
    found = [name for name in models.names() if abstract(name).backbone is not None]
    expected = ["pspnet50", "pspnet101", "resnet50_duc_hdc", "resnet101_duc_hdc"]
    assert found == expected


@pytest.mark.parametrize("name", models.names())
@pytest.mark.slow
def test_auxiliary_logits_are_like_the_logits_or_none(name):
    entry, model = models.describe(name), abstract(name)
    shape = (2, *entry.input_shape)
    result, auxiliary = output(model, shape, "with_auxiliary")
    assert result == output(model, shape)
    if name.startswith("pspnet"):
        assert auxiliary == result
        assert model.auxiliary_weight == 0.4
    else:
        assert auxiliary is None
        assert model.auxiliary_weight == 0.0


@pytest.mark.parametrize("name", [*CLASSIFIERS, "vgg11_bn", "deit_b_16_distilled"])
def test_the_number_of_classes_changes_the_head_alone(name):
    model = abstract(name)
    before, after = shapes(model), shapes(abstract(name, num_classes=7))
    changed = {path for path in before if before[path] != after[path]}
    heads = tuple(f"{path}." for path in model.head_paths)
    assert changed == {path for path in before if path.startswith(heads)}
    assert {path.rpartition(".")[0] for path in changed} == set(model.head_paths)


def test_a_network_needs_a_call():
    with pytest.raises(TypeError, match="abstract"):
        models.Network()


def test_a_resnet_without_a_head_has_features_only():
    backbone = abstract("pspnet50").backbone
    with pytest.raises(ValueError, match=r"num_classes=None.*use features"):
        output(backbone, (1, 32, 32, 3))


def sizes(entry):
    """Returns the published size and, if the network takes others, a wide one."""
    height, width, _ = entry.input_shape
    if "image_size" in entry.options:
        return [(height, width)]
    if entry.task == "translation":
        return [(height, width), (height, 2 * width)]
    return [(height, width), (40, 48)]


@pytest.mark.parametrize("name", EACH)
def test_output_shape(name):
    entry, model = models.describe(name), abstract(name)
    channels = entry.input_shape[2]
    for height, width in sizes(entry):
        if name == "patchgan70":
            # There are three halvings, and two convolutions lose a pixel each.
            expected = (height // 8 - 2, width // 8 - 2, 1)
        elif name == "patchgan16":
            expected = (height // 2 - 2, width // 2 - 2, 1)
        elif name == "pixelgan":
            expected = (height, width, 1)
        elif entry.task == "translation":
            expected = (height, width, 3)
        elif entry.task == "segmentation":
            expected = (height, width, entry.published["num_classes"])
        else:
            expected = (entry.published["num_classes"],)
        assert output_shape(model, (2, height, width, channels)) == (2, *expected)


@pytest.mark.parametrize("name", models.names())
def test_options_are_those_of_the_class_and_the_layers(name):
    entry = models.describe(name)
    own = set(inspect.signature(network_class(name).__init__).parameters)
    assert set(entry.options) <= own | set(Layers.__dataclass_fields__)
    assert {"dtype", "param_dtype"} <= set(entry.options)
    assert len(set(entry.options)) == len(entry.options)


@pytest.mark.parametrize("name", FIRST)
def test_channels_and_classes_are_options(name):
    entry = models.describe(name)
    height, width, _ = entry.input_shape
    options = {"in_channels": 2}
    if "num_classes" in entry.options:
        options["num_classes"] = 7
    if "out_channels" in entry.options:
        options["out_channels"] = 7
    shape = output_shape(abstract(name, **options), (1, height, width, 2))
    assert shape[-1] == (7 if len(options) > 1 else 1)


@pytest.mark.parametrize("name", FIRST)
def test_other_channels_than_the_networks_are_refused(name):
    height, width, channels = models.describe(name).input_shape
    with pytest.raises(models.ImageShapeError, match=r"in_channels"):
        output_shape(abstract(name), (1, height, width, channels + 1))


REFUSED = [
    ("vgg11_bn", (16, 64), "at least 32x32, got 16x64"),
    ("densenet121_cifar", (4, 8), "at least 8x8, got 4x8"),
    ("densenet121", (31, 31), "at least 32x32, got 31x31"),
    ("upanet16", (64, 64), "32x32, got 64x64.*image_size"),
    ("deit_ti_16", (224, 192), "224x224, got 224x192.*image_size"),
    ("pspnet50", (60, 64), "multiples of 8, got 60x64.*56x64 or 64x64"),
    ("resnet50_duc_hdc", (7, 8), "multiples of 8, got 7x8.*8x8 or 8x8"),
    ("unet_small", (64, 65), "multiples of 8, got 64x65.*64x64 or 64x72"),
    ("unet256", (256, 300), "multiples of 256, got 256x300.*256x256 or 256x512"),
    ("unet128", (64, 64), "multiples of 128, got 64x64"),
    ("patchgan70", (23, 23), "at least 24x24, got 23x23"),
    ("patchgan16", (6, 5), "at least 6x6, got 6x5"),
]


@pytest.mark.parametrize(("name", "size", "message"), REFUSED)
def test_size_that_a_network_cannot_take_is_refused(name, size, message):
    channels = models.describe(name).input_shape[2]
    with pytest.raises(models.ImageShapeError, match=message):
        output_shape(abstract(name), (1, *size, channels))


@pytest.mark.slow
def test_smallest_images_that_are_not_refused_work():
    assert output_shape(abstract("densenet121_cifar"), (1, 8, 8, 3)) == (1, 10)
    assert output_shape(abstract("densenet121"), (1, 32, 32, 3)) == (1, 1000)
    assert output_shape(abstract("vgg11_bn"), (1, 32, 32, 3)) == (1, 1000)
    assert output_shape(abstract("patchgan70"), (1, 24, 24, 6)) == (1, 1, 1, 1)
    assert output_shape(abstract("patchgan16"), (1, 6, 6, 6)) == (1, 1, 1, 1)
    assert output_shape(abstract("resnet18"), (1, 1, 1, 3)) == (1, 1000)
    assert output_shape(abstract("pspnet50"), (1, 8, 8, 3)) == (1, 8, 8, 21)


@pytest.mark.parametrize(
    ("name", "image_size"), [("upanet16", 12), ("deit_ti_16", 8), ("deit_ti_16", 40)]
)
def test_image_size_that_a_network_cannot_have_is_refused(name, image_size):
    with pytest.raises(models.ImageShapeError, match=rf"multiple of.*got {image_size}"):
        abstract(name, image_size=image_size)


@pytest.mark.slow
def test_image_size_and_patch_size_are_options():
    model = abstract("deit_ti_16", image_size=32, patch_size=4, num_classes=5)
    assert output_shape(model, (2, 32, 32, 3)) == (2, 5)
    assert model.pos_embed.shape == (1, 65, 192)
    model = abstract("upanet16", image_size=8)
    assert output_shape(model, (2, 8, 8, 3)) == (2, 10)


def test_names_take_patterns_and_tasks():
    assert "resnet110" in models.names("resnet1*")
    assert models.names("no such*") == ()
    by_task = [
        models.names(task=task)
        for task in ("classification", "segmentation", "translation")
    ]
    assert sorted(sum(by_task, ())) == sorted(models.names())
    assert models.names("unet*", task="segmentation") == ("unet_small",)


def test_every_network_is_described():
    for name in models.names():
        entry = models.describe(name)
        assert entry.name == name
        assert "https://" in entry.paper
        assert entry.description[0].isupper()
        assert "\n" not in entry.description


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'resnet9'.*known: resnet8, resnet20"):
        models.create("resnet9", num_classes=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("resnet9", "resnet"),
        ("ResNet50", "resnet50"),
        ("mobilenetv2", "mobilenet_v2"),
        ("vit_b16", "vit_b_16"),
        ("densenet-121", "densenet121"),
    ],
)
def test_a_misspelt_name_suggests_similar_ones(name, similar):
    with pytest.raises(ValueError, match=rf"unknown model '{name}'; did you mean .*\?"):
        models.describe(name)
    with pytest.raises(ValueError, match=rf"did you mean [^?]*{similar}[^?]*\?"):
        models.create(name, rngs=nnx.Rngs(0), num_classes=2)


# Network, option, value.
NO_COUNTS = [
    ("deit_ti_16", "image_size", (32, 32)),
    ("deit_ti_16", "image_size", 32.0),
    ("deit_ti_16", "image_size", "32"),
    ("deit_ti_16", "image_size", -16),
    ("deit_ti_16", "patch_size", (16, 16)),
    ("upanet16", "image_size", [32, 32]),
    ("upanet16", "image_size", 0),
    ("resnet8", "num_classes", 0),
    ("resnet8", "num_classes", "10"),
    ("resnet8", "num_classes", 10.0),
    ("resnet8", "num_classes", True),
    ("resnet8", "num_classes", None),
    ("resnet8", "in_channels", 0),
    ("unet64_small", "out_channels", -1),
]


@pytest.mark.parametrize(("name", "option", "value"), NO_COUNTS)
def test_options_that_count_must_be_whole_numbers(name, option, value):
    message = rf"{option} must be a whole number of at least 1.*; got "
    with pytest.raises(ValueError, match=message + re.escape(repr(value))):
        abstract.__wrapped__(name, **{option: value})


def test_unknown_option_lists_the_known():
    options = {"num_classes": 2, "norm": "batch", "wdith": 1}
    with pytest.raises(ValueError, match=r"no option norm, wdith; it takes .*remat"):
        models.create("vit_b_16", rngs=nnx.Rngs(0), **options)


def test_missing_number_of_classes_is_named():
    with pytest.raises(ValueError, match=r"pspnet50 needs num_classes"):
        models.create("pspnet50", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unet256 has no option num_classes"):
        models.create("unet256", rngs=nnx.Rngs(0), num_classes=3)


def test_unknown_norm_lists_the_known():
    with pytest.raises(ValueError, match=r"batch, frozen_batch.*got 'layer'"):
        models.create("resnet8", num_classes=2, rngs=nnx.Rngs(0), norm="layer")


@pytest.mark.parametrize("norm", ["none", "frozen_batch", "instance"])
def test_zero_init_needs_a_scale_that_trains(norm):
    with pytest.raises(ValueError, match=rf"zero_init_last_norm.*got '{norm}'"):
        models.create(
            "resnet8",
            num_classes=2,
            rngs=nnx.Rngs(0),
            norm=norm,
            zero_init_last_norm=True,
        )
