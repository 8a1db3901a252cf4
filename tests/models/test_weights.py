"""Tests of weights files: names, layouts, round trips and refusals."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import models
from models._layers import Layers
from models._layout import layout, naming_of, renamed, slots_of
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

LAYOUTS = {
    (naming, name): {array: tuple(shape) for array, shape in arrays.items()}
    for naming, networks in json.loads(
        Path(__file__).with_name("torch_layouts.json").read_text()
    ).items()
    for name, arrays in networks.items()
}
# (names of other namings, function that builds a small network from `layers`)
FORMS = {
    "resnet": ((), partial(ResNet, (1, 1), num_classes=3, width=8, expansion=4)),
    "preact": ((), partial(PreActResNet, (1, 1), num_classes=3, stem=4, width=8)),
    "vgg": ((), partial(VGG, (1, 1, 1, 1, 1), num_classes=3, small_images=True)),
    "densenet": (
        ("torchvision, 2017",),
        partial(DenseNet, (1, 1), num_classes=3, growth=4, small_images=False),
    ),
    "mobilenet": (("timm",), partial(MobileNetV2, num_classes=3, small_images=False)),
    "upanet": ((), partial(UPANet, 4, num_classes=3, image_size=8)),
    "transformer": (
        ("torchvision", "torchvision, 2021"),
        partial(VisionTransformer, 8, 2, 2, num_classes=3, image_size=8, patch_size=4),
    ),
    "distilled": (
        (),
        partial(
            VisionTransformer,
            8,
            2,
            1,
            num_classes=3,
            image_size=8,
            patch_size=4,
            distilled=True,
        ),
    ),
    "pspnet": ((), partial(PSPNet, (1, 1, 1, 1), num_classes=3)),
    "duc": ((), partial(DUCHDC, (1, 1, 1, 1), num_classes=3)),
    "unet": ((), partial(UNet, num_classes=3)),
    "generator": ((), partial(Generator, 5)),
    "discriminator": (
        (),
        partial(Discriminator, (8, 16), (2, 2, 1), 4, last_bias=True),
    ),
}


def filled(make, seed=0, **options):
    """Returns a network of random values, faster than with its initializers."""
    generator = np.random.default_rng(seed)

    def fill(path, x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            is_variance = "'var'" in jax.tree_util.keystr(path)
            made = generator.normal(size=x.shape)
            return jnp.asarray(abs(made) if is_variance else made, x.dtype)
        return jax.random.key(0) if x.dtype != jnp.uint32 else jnp.uint32(0)

    def build():
        return make(layers=Layers(rngs=nnx.Rngs(0), **options))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree.map_with_path(fill, state))


def make_by_name(name, **options):
    return lambda layers: models.create(name, rngs=layers.rngs, **options)


def resnet(seed=0, *, num_classes=3, **options):
    make = partial(ResNet, (1, 1), num_classes=num_classes, width=8, stem=3)
    return filled(make, seed, **options)


def values(model):
    """Returns copies of all parameters and statistics, by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {path: np.array(variable[...]) for path, variable in state}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=str(path))


def arrays_of(model, tmp_path, naming=None):
    """Returns the arrays in a file of the model's weights."""
    path = tmp_path / "arrays.safetensors"
    models.save_weights(model, path, naming=naming)
    return safetensors.numpy.load_file(path)


def write(tmp_path, arrays):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path
    )
    return path


# --- Files of PyTorch's libraries ---


@functools.cache
def abstract(name):
    make = partial(models.create, name, num_classes=1000)
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("naming", "name"), LAYOUTS)
def test_names_and_shapes_are_those_of_the_library(naming, name):
    expected = {
        array: shape
        for array, shape in LAYOUTS[naming, name].items()
        if not array.endswith("num_batches_tracked")
    }
    model = abstract(name)
    assert layout(model, naming) == expected
    # The names of a file tell which library it is from.
    found = naming_of(model, slots_of(model), set(expected))
    assert layout(model, found) == expected


OLDER_NAMES = [
    (
        "densenet",
        "torchvision, 2017",
        {
            "features.denseblock2.denselayer1.norm.1.running_var",
            "features.denseblock2.denselayer1.conv.2.weight",
            "features.transition1.norm.weight",
            "features.norm0.bias",
        },
    ),
    (
        "transformer",
        "torchvision, 2021",
        {
            "encoder.layers.encoder_layer_1.mlp.linear_1.weight",
            "encoder.layers.encoder_layer_1.mlp.linear_2.bias",
            "encoder.layers.encoder_layer_1.self_attention.in_proj_weight",
            "heads.head.weight",
        },
    ),
]


@pytest.mark.parametrize(("form", "naming", "names"), OLDER_NAMES)
def test_older_files_of_torchvision_have_names_of_their_own(form, naming, names):
    assert names <= layout(filled(FORMS[form][1]), naming).keys()


def test_vgg_in_the_layout_of_timm_has_the_same_weights(tmp_path, monkeypatch):
    # Hidden layers of 4096 are too large for a test.
    linear = Layers.linear

    def narrow(self, inputs, outputs, **options):
        inputs, outputs = (2 if size == 4096 else size for size in (inputs, outputs))
        return linear(self, inputs, outputs, **options)

    monkeypatch.setattr(Layers, "linear", narrow)
    monkeypatch.setattr(
        VGG,
        "other_shapes",
        {
            "pre_logits.fc1.weight": (2, 512, 7, 7),
            "pre_logits.fc2.weight": (2, 2, 1, 1),
        },
    )
    make = partial(VGG, (1, 1, 1, 1, 1), num_classes=3, small_images=False)
    model, other = filled(make, 0), filled(make, 1)
    arrays = arrays_of(model, tmp_path, "timm")
    assert arrays["pre_logits.fc1.weight"].shape == (2, 512, 7, 7)
    models.load_weights(other, tmp_path / "arrays.safetensors")
    assert_equal(values(other), values(model))


# Forms of networks that are no classifiers.
WITHOUT_HEAD = ("pspnet", "duc", "unet", "generator", "discriminator")
ROUND_TRIPS = [
    (form, naming) for form, (others, _) in FORMS.items() for naming in (None, *others)
]


@pytest.mark.parametrize(("form", "naming"), ROUND_TRIPS)
@pytest.mark.slow
def test_weights_come_back_as_they_were_saved(form, naming, tmp_path):
    _, make = FORMS[form]
    model, other = filled(make, 0), filled(make, 1)
    arrays = arrays_of(model, tmp_path)
    names = renamed(model, naming, arrays)
    if naming is not None:
        assert set(names.values()) != set(arrays)
    stored = {names[name]: array for name, array in arrays.items()}
    models.load_weights(other, write(tmp_path, stored))
    assert_equal(values(other), values(model))


def test_every_class_has_a_round_trip():
    classes = {make.func for _, make in FORMS.values()}
    builds = [models.describe(name).build for name in models.names()]
    assert classes == {getattr(build, "func", build) for build in builds}


@pytest.mark.parametrize("norm", ["frozen_batch", "group", "instance", "none"])
def test_other_norms_come_back_as_they_were_saved(norm, tmp_path):
    model, other = resnet(0, norm=norm), resnet(1, norm=norm)
    arrays_of(model, tmp_path)
    models.load_weights(other, tmp_path / "arrays.safetensors")
    assert_equal(values(other), values(model))


def test_batch_norm_can_be_frozen_by_way_of_a_file(tmp_path):
    model, frozen = resnet(0), resnet(1, norm="frozen_batch")
    expected = arrays_of(model, tmp_path)
    models.load_weights(frozen, tmp_path / "arrays.safetensors")
    assert_equal(arrays_of(frozen, tmp_path), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_take_the_dtype_of_the_model(dtype, tmp_path):
    model = resnet()
    arrays = {
        name: array.astype(dtype) for name, array in arrays_of(model, tmp_path).items()
    }
    models.load_weights(model, write(tmp_path, arrays))
    for name, array in arrays_of(model, tmp_path).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))


def test_bfloat16_parameters_come_back_as_they_were_saved(tmp_path):
    model, other = (resnet(seed, param_dtype=jnp.bfloat16) for seed in (0, 1))
    arrays = arrays_of(model, tmp_path)
    assert arrays["conv1.weight"].dtype == ml_dtypes.bfloat16
    assert arrays["bn1.running_mean"].dtype == np.float32
    models.load_weights(other, tmp_path / "arrays.safetensors")
    assert_equal(values(other), values(model))


def test_counter_of_batches_is_ignored(tmp_path):
    model, other = resnet(0), resnet(1)
    arrays = arrays_of(model, tmp_path)
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.array(7)
        for name in arrays
        if name.endswith("running_mean")
    }
    assert counters
    models.load_weights(other, write(tmp_path, arrays | counters))
    assert_equal(values(other), values(model))


# --- Transfer ---


@pytest.mark.parametrize(
    ("form", "naming"),
    [row for row in ROUND_TRIPS if row[0] not in WITHOUT_HEAD],
)
def test_new_head_leaves_the_last_layer_alone(form, naming, tmp_path):
    _, make = FORMS[form]
    model, other = filled(make, 0), filled(partial(make, num_classes=5), 1)
    before, expected = values(other), values(model)
    arrays = arrays_of(model, tmp_path)
    names = renamed(model, naming, arrays)
    path = write(tmp_path, {names[name]: array for name, array in arrays.items()})
    with pytest.raises(ValueError, match=r"in the model(.|\n)*new_head=True"):
        models.load_weights(other, path)
    assert_equal(values(other), before)
    models.load_weights(other, path, new_head=True)
    changed = 0
    for name, value in values(other).items():
        is_head = ".".join(map(str, name)).startswith(model.head_paths)
        source = before if is_head else expected
        np.testing.assert_array_equal(value, source[name])
        changed += is_head
    assert changed == 2 * (2 if form == "distilled" else 1)


@pytest.mark.parametrize("form", ["pspnet", "duc"])
def test_backbone_takes_a_classifiers_weights(form, tmp_path):
    make = partial(ResNet, (1, 1, 1, 1), num_classes=3, expansion=4)
    classifier, model = filled(make, 0), filled(FORMS[form][1], 1)
    before = values(model)
    expected = arrays_of(classifier, tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: fc\.bias(.|\n)*new_head=True"):
        models.load_weights(model.backbone, tmp_path / "arrays.safetensors")
    path = tmp_path / "arrays.safetensors"
    models.load_weights(model.backbone, path, new_head=True)
    del expected["fc.weight"], expected["fc.bias"]
    assert_equal(arrays_of(model.backbone, tmp_path), expected)
    after = values(model)
    rest = {name for name in before if name[0] != "backbone"}
    assert rest
    assert_equal({n: after[n] for n in rest}, {n: before[n] for n in rest})


# --- Refusals ---


def test_all_that_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    model = resnet()
    before = values(model)
    arrays = arrays_of(resnet(1), tmp_path)
    del arrays["layer1.0.bn1.weight"], arrays["layer2.0.conv2.weight"]
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :1]
    arrays["bn1.bias"] = arrays["bn1.bias"][:7]
    arrays["extra.weight"] = np.zeros(2, np.float32)
    arrays["another"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="does not fit this ResNet") as error:
        models.load_weights(model, write(tmp_path, arrays))
    assert str(error.value).splitlines()[1:] == [
        "  bn1.bias has shape (7,), but (64,) in the model",
        "  conv1.weight has shape (64, 1, 3, 3), but (64, 3, 3, 3) in the model",
        "  missing: layer1.0.bn1.weight",
        "  missing: layer2.0.conv2.weight",
        "  unexpected: another",
        "  unexpected: extra.weight",
        "see docs/networks.md#pretrained-weights",
    ]
    assert_equal(values(model), before)


def test_another_network_of_the_same_names_is_refused(tmp_path):
    model = resnet()
    before = values(model)
    make = partial(ResNet, (1, 2), num_classes=3, width=8, stem=3)
    arrays_of(filled(make), tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: layer2\.1\.bn1\.bias"):
        models.load_weights(model, tmp_path / "arrays.safetensors", new_head=True)
    assert_equal(values(model), before)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype, tmp_path):
    model = resnet()
    before = values(model)
    arrays = arrays_of(resnet(1), tmp_path)
    arrays["fc.weight"] = arrays["fc.weight"].astype(dtype)
    with pytest.raises(ValueError, match=r"fc\.weight has dtype (I8|F8_E4M3)"):
        models.load_weights(model, write(tmp_path, arrays))
    assert_equal(values(model), before)


def prefixed(prefix):
    return lambda arrays: {prefix + name: array for name, array in arrays.items()}


PREFIXES = ["module.", "_orig_mod.", "model.", "state_dict.", "module._orig_mod.", "a."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_ignored(prefix, tmp_path):
    model, other = resnet(0), resnet(1)
    arrays = arrays_of(model, tmp_path)
    counter = {"bn1.num_batches_tracked": np.array(7)}
    path = write(tmp_path, prefixed(prefix)(arrays | counter))
    models.load_weights(other, path)
    assert_equal(values(other), values(model))
    models.load_weights(resnet(num_classes=5), path, new_head=True)


@pytest.mark.parametrize("naming", [None, "torchvision", "torchvision, 2021"])
def test_a_prefix_before_the_names_of_another_library(naming, tmp_path):
    _, make = FORMS["transformer"]
    model, other = filled(make, 0), filled(make, 1)
    arrays = arrays_of(model, tmp_path)
    names = renamed(model, naming, arrays)
    stored = {f"module.{names[name]}": array for name, array in arrays.items()}
    models.load_weights(other, write(tmp_path, stored))
    assert_equal(values(other), values(model))


# What is wrong, how it is made from the arrays of a ResNet-8, and the one line after
# "does not fit this ResNet: ".
ONE_LINE = {
    "parts of a checkpoint": (
        lambda arrays: prefixed("state_dict.")(arrays) | {"optimizer.step": np.ones(1)},
        "its names begin with 'state_dict.', beside others that are not of this "
        "network (optimizer.step); save the arrays below 'state_dict.' alone",
    ),
    "parts in two levels": (
        lambda arrays: (
            prefixed("net.model.")(arrays) | {"net.ema.decay": np.ones(1, np.float32)}
        ),
        "its names begin with 'net.model.', beside others that are not of this network "
        "(net.ema.decay); save the arrays below 'net.model.' alone",
    ),
    "other classes": (
        lambda arrays: arrays | {"fc.bias": np.ones(5), "fc.weight": np.ones((5, 64))},
        "only the last layer differs (fc.weight has shape (5, 64), but (10, 64) in the "
        "model; fc.bias has shape (5,), but (10,) in the model); skip it with "
        "new_head=True",
    ),
}


@pytest.mark.parametrize(("change", "line"), ONE_LINE.values(), ids=ONE_LINE)
def test_what_is_wrong_is_one_line_with_the_remedy(change, line, tmp_path):
    model = filled(make_by_name("resnet8", num_classes=10))
    before = values(model)
    path = write(tmp_path, change(arrays_of(model, tmp_path)))
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_weights(model, path)
    assert str(error.value) == f"{path} does not fit this ResNet: {line}"
    assert_equal(values(model), before)


# The network whose weights a file has, its options, the network that it is loaded
# into, and the network that the message names.
OTHERS = [
    ("resnet8", {"num_classes": 10}, "resnet20", "resnet8"),
    pytest.param(
        "resnet20", {"num_classes": 10}, "resnet8", "resnet20", marks=pytest.mark.slow
    ),
    pytest.param(
        "resnet8", {"num_classes": 100}, "unet_small", "resnet8", marks=pytest.mark.slow
    ),
    pytest.param(
        "resnet8",
        {"num_classes": 10, "in_channels": 1},
        "resnet20",
        "resnet8",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "unet_small",
        {"num_classes": 11},
        "resnet8",
        "unet_small",
        marks=pytest.mark.slow,
    ),
    pytest.param("patchgan16", {}, "resnet8", "patchgan16", marks=pytest.mark.slow),
    pytest.param(
        "vgg11_bn_cifar",
        {"num_classes": 10},
        "preact_resnet18",
        "vgg11_bn_cifar",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("theirs", "options", "ours", "named"), OTHERS)
def test_weights_of_another_network_are_recognized(
    theirs, options, ours, named, tmp_path
):
    path = tmp_path / "arrays.safetensors"
    models.save_weights(filled(make_by_name(theirs, **options)), path)
    model = filled(make_by_name(ours, num_classes=10))
    for new_head in (False, True):
        with pytest.raises(ValueError, match="does not fit") as error:
            models.load_weights(model, path, new_head=new_head)
        (line,) = str(error.value).splitlines()
        assert f"it looks like {named} ({models.describe(named).description})" in line
        assert line.endswith(f'load it into models.create("{named}", ...)')


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1), (4, 3)])
@pytest.mark.parametrize("form", ["resnet", "vgg", "transformer"])
def test_images_of_other_channels_are_recognized(
    form, theirs, ours, new_head, tmp_path
):
    _, make = FORMS[form]
    arrays_of(filled(partial(make, in_channels=theirs)), tmp_path)
    classes = 4 if new_head else 3
    model = filled(partial(make, in_channels=ours, num_classes=classes))
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_weights(model, tmp_path / "arrays.safetensors", new_head=new_head)
    (line,) = str(error.value).splitlines()
    assert line.endswith(
        f"it is for images of {theirs} channels: create the network with "
        f"in_channels={theirs}"
    )


def test_at_most_a_few_arrays_are_listed(tmp_path):
    wide, narrow = (
        filled(partial(ResNet, (1, 1), num_classes=3, width=width)) for width in (8, 5)
    )
    arrays_of(wide, tmp_path)
    with pytest.raises(ValueError, match=r"\d+ of \d+ arrays differ") as error:
        models.load_weights(narrow, tmp_path / "arrays.safetensors")
    lines = str(error.value).splitlines()
    assert 3 < len(lines) < 10
    assert re.search(r" and \d+ more$", lines[6])


@pytest.mark.parametrize(
    "form",
    [
        "transformer",
        "distilled",
        pytest.param("upanet", marks=pytest.mark.slow),
    ],
)
def test_another_image_size_names_the_option(form, tmp_path):
    make = FORMS[form][1]
    arrays_of(filled(partial(make, image_size=16)), tmp_path)
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_weights(filled(make), tmp_path / "arrays.safetensors")
    (line,) = str(error.value).splitlines()
    assert "create the network with that image_size, as this one is for 8x8" in line


NUMBERS = {
    "NaN": (np.float32, np.nan),
    "infinity": (np.float32, np.inf),
    "minus infinity": (np.float16, -np.inf),
    "bfloat16 NaN": (ml_dtypes.bfloat16, np.nan),
    "beyond float32": (np.float64, 1e39),
    "below float32": (np.float64, -1e300),
}


@pytest.mark.parametrize(("dtype", "number"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", ["layer2.0.conv2.weight", "bn1.running_var"])
def test_numbers_that_no_network_has_are_refused_by_name(name, dtype, number, tmp_path):
    model = resnet()
    before = values(model)
    arrays = arrays_of(resnet(1), tmp_path)
    arrays[name] = arrays[name].astype(dtype)
    arrays[name].flat[-1] = number
    message = rf"NaN, infinity or numbers too large for .* in {re.escape(name)}$"
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, write(tmp_path, arrays))
    assert_equal(values(model), before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("number", [-1, -1e-3])
def test_negative_variances_are_refused_by_name(number, dtype, tmp_path):
    model = resnet()
    before = values(model)
    arrays = arrays_of(resnet(1), tmp_path)
    for name in ("bn1.running_var", "layer1.0.bn2.running_var"):
        arrays[name] = arrays[name].astype(dtype)
        arrays[name].flat[0] = number
    arrays["bn1.running_mean"].flat[0] = number
    message = r"variances below 0 in bn1.running_var, layer1.0.bn2.running_var: it is"
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, write(tmp_path, arrays))
    assert_equal(values(model), before)


def test_numbers_beyond_the_dtype_of_the_model_are_refused(tmp_path):
    arrays = arrays_of(resnet(), tmp_path)
    arrays["fc.weight"][0, 0] = 1e6
    path = write(tmp_path, arrays)
    models.load_weights(resnet(param_dtype=jnp.bfloat16), path)
    with pytest.raises(ValueError, match=r"too large .* in fc\.weight"):
        models.load_weights(resnet(param_dtype=jnp.float16), path)
    # A head that is skipped is not read.
    models.load_weights(resnet(param_dtype=jnp.float16), path, new_head=True)


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file {path}")):
        models.load_weights(resnet(), path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file_is_refused(kept, tmp_path):
    model = resnet()
    before = values(model)
    arrays_of(resnet(1), tmp_path)
    path = tmp_path / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"arrays\.safetensors is not a safetensors file"
    ):
        models.load_weights(model, path)
    assert_equal(values(model), before)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".PT", ".bin", ".pth.tar", ".safetensors"])
def test_pickle_is_never_opened(suffix, tmp_path):
    path, exploded = tmp_path / f"weights{suffix}", tmp_path / "exploded"
    path.write_bytes(pickle.dumps(Bomb(exploded)))
    message = "not a safetensors file" if suffix == ".safetensors" else "pickle file"
    with pytest.raises(ValueError, match=message):
        models.load_weights(resnet(), path)
    assert not exploded.exists()
    pickle.loads(path.read_bytes())  # The check above can fail.
    assert exploded.exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_instructions_to_convert_a_pickle_work(wrapped, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, other = resnet(0), resnet(1)
    weights = {
        name: torch.from_numpy(array.copy())
        for name, array in arrays_of(model, tmp_path).items()
    }
    # State dicts may hold arrays that are not contiguous.
    weights["fc.weight"] = weights["fc.weight"].T.contiguous().T
    weights["bn1.num_batches_tracked"] = torch.tensor(7)
    path = tmp_path / "it's weights.pth"
    torch.save({"model": weights} if wrapped else weights, path)
    with pytest.raises(ValueError, match="Convert it once") as error:
        models.load_weights(other, path)
    code = "\n".join(
        line[2:] for line in str(error.value).splitlines() if line.startswith("  ")
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    models.load_weights(other, path.with_suffix(".safetensors"))
    assert_equal(values(other), values(model))


# --- Saving ---


@pytest.mark.parametrize("existed", [False, True])
def test_failed_save_leaves_what_was_there(existed, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    if existed:
        path.write_bytes(b"old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save_weights(resnet(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] * existed
    if existed:
        assert path.read_bytes() == b"old"


def test_save_takes_the_place_of_an_older_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    for seed in (0, 1):
        models.save_weights(resnet(seed), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = resnet(2)
    models.load_weights(other, str(path))
    assert_equal(values(other), values(resnet(1)))


def test_saved_file_has_the_usual_permissions(tmp_path):
    path, usual = tmp_path / "weights.safetensors", tmp_path / "usual"
    usual.touch()
    models.save_weights(resnet(), path)
    assert path.stat().st_mode == usual.stat().st_mode


def test_save_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        models.save_weights(resnet(), tmp_path / "missing" / "w.safetensors")


def test_unknown_naming_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torchvision, timm; got 'tim'"):
        models.save_weights(resnet(), tmp_path / "w.safetensors", naming="tim")
    assert not os.listdir(tmp_path)
