"""Pretrained networks: frozen parts, norms and normalization."""

import dataclasses
import json
import typing

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import models
from optax_tricks.nnx import split
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.program import open_program
from train.settings import from_json
from train.tasks import open_task
from train.tasks.classification import ClassificationConfig
from train.tasks.fine_tuning import freeze
from train.tasks.segmentation import SegmentationConfig

pytestmark = pytest.mark.usefixtures("thin")

RGB = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def names_of(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves}


@pytest.fixture(scope="module")
def weights(thin, tmp_path_factory):
    """Weights of RGB images and seven classes, with statistics of their own."""
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    network = models.create("resnet8", num_classes=7, rngs=nnx.Rngs(3))
    for _, module in nnx.iter_modules(network):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] += 0.25
    models.save_weights(network, path)
    return path


######## Freezing #####################################################################


QUICK = ("resnet8", "vgg11_bn")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in models.names(task="classification")
    ],
)
def test_all_but_the_last_layers_are_frozen_in_every_classifier(name):
    def create(is_frozen):
        options = {"num_classes": 5}
        network = models.create(name, rngs=nnx.Rngs(0), **options)
        if is_frozen:
            freeze(network, trained=network.head_paths)
        return network

    whole, frozen = (nnx.eval_shape(lambda f=f: create(f)) for f in (False, True))
    prefixes = tuple(f"{path}." for path in frozen.head_paths)
    _, all_params, all_rest = split(whole)
    _, params, rest = split(frozen)
    expected = {n for n in names_of(all_params) if n.startswith(prefixes)}
    assert names_of(params) == expected != set()
    assert names_of(rest) == names_of(all_rest) | (names_of(all_params) - expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {}),
        pytest.param("deit_ti_16", {"image_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_frozen_networks_have_the_same_weights_files(name, options, tmp_path):
    path = tmp_path / "weights.safetensors"

    def create(seed):
        return models.create(name, num_classes=5, rngs=nnx.Rngs(seed), **options)

    network, frozen = create(0), create(1)
    freeze(frozen, trained=frozen.head_paths)
    models.save_weights(network, path)
    expected = load_file(path)
    models.load_weights(frozen, path)
    models.save_weights(frozen, path)
    chex.assert_trees_all_equal(load_file(path), expected)


def fine_tuned(weights, **changes):
    """Returns the parameters before, and the state after, two steps."""
    config = ClassificationConfig(
        weights=weights,
        normalization="imagenet",
        freeze="backbone",
        batch_size=700,
        epochs=1,
        **changes,
    )
    program, _ = open_program(config)
    said = []
    state = program.init_state(0, said.append)
    assert said == [f"the head (fc) starts anew, as {weights} has none for 10 classes"]
    before = jax.tree.map(np.array, state.params)
    feeds = program.feeds(0)
    for _ in range(2):
        state = program.train_step(state, next(feeds))
    return before, state


@pytest.mark.usefixtures("one_device")
def test_a_frozen_backbone_has_no_state_and_does_not_change(weights):
    optimizer = OptimizerConfig(
        optimizer="adamw",
        weight_decay=0.5,
        techniques=("perturbed_unit_step", "centralize"),
        learning_rate=0.1,
    )
    before, state = fine_tuned(
        weights, optimizer=optimizer, norm="frozen_batch", ema=0.9, grad_accum=2
    )
    assert names_of(state.params) == {"model.fc.bias", "model.fc.kernel"}
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.ndim == 0 or leaf.shape in ((16, 10), (10,), (2,))
    kernel = state.params["model"]["fc"]["kernel"]
    assert (kernel != before["model"]["fc"]["kernel"]).any()
    # The state holds all weights of the file but the head, bit for bit, and so does the
    # moving average.
    saved = load_file(weights)
    for _, kept in (state.ema, (state.params, state.model_state)):
        model = kept["model"]
        np.testing.assert_array_equal(
            np.asarray(model["conv1"]["kernel"]).transpose(3, 2, 0, 1),
            saved["conv1.weight"],
        )
        np.testing.assert_array_equal(model["bn1"]["mean"], saved["bn1.running_mean"])
        np.testing.assert_array_equal(model["bn1"]["scale"], saved["bn1.weight"])


@pytest.mark.usefixtures("one_device")
def test_trained_norms_move_their_statistics(weights):
    _, state = fine_tuned(weights, norm=None)
    moved = np.asarray(state.model_state["model"]["bn1"]["mean"])
    assert (moved != load_file(weights)["bn1.running_mean"]).all()


def test_the_frozen_gradient_is_that_of_the_head(weights):
    """Freezing changes no number of the head."""
    config = ClassificationConfig(weights=weights, normalization="imagenet")
    batch, grads = None, []
    for freeze_what in ("none", "backbone"):
        task, dataset = open_task(dataclasses.replace(config, freeze=freeze_what))
        if batch is None:
            batch = dataset.split("train").read(range(16))
        networks = task.create_networks(nnx.Rngs(0))
        task.load_weights(networks)
        graphdef, params, rest = split(networks["model"])
        prepared = task.prepare(batch, jax.random.key(0))

        def loss(params, graphdef=graphdef, rest=rest, task=task, prepared=prepared):
            network = nnx.merge(graphdef, params, rest, copy=True)
            return task.loss("model", {"model": network}, prepared)[0][0]

        grads.append(jax.jit(jax.grad(loss))(params)["fc"])
    chex.assert_trees_all_close(*grads, atol=1e-5)


######## Settings #####################################################################


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            ClassificationConfig,
            {"norm": "layer"},
            r"norm must be 'batch', 'frozen_batch', 'group', 'instance' or 'none', got",
        ),
        (
            ClassificationConfig,
            {"norm": "group", "model": "vit_b_16"},
            "vit_b_16 has no choice of norm, got 'group': leave norm out, or take one "
            "of resnet8, ",
        ),
        (
            ClassificationConfig,
            {"norm": "frozen_batch"},
            "norm 'frozen_batch' keeps .*: name a file with weights",
        ),
        (
            ClassificationConfig,
            {"freeze": "backbone"},
            "freeze 'backbone' keeps what is pretrained, .*: name a file with weights",
        ),
        (
            ClassificationConfig,
            {"new_head": True},
            "new_head is for pretrained weights: name a file with weights, or leave ",
        ),
        (
            ClassificationConfig,
            {"freeze": "head"},
            "freeze must be 'none' or 'backbone'",
        ),
        (
            SegmentationConfig,
            {"freeze": "backbone"},
            "freeze 'backbone' keeps .*: name a file with backbone_weights",
        ),
        (
            SegmentationConfig,
            {"norm": "frozen_batch"},
            "norm must be 'batch', 'group', ",
        ),
        (
            ClassificationConfig,
            {"normalization": "imagnet"},
            "unknown normalization 'imagnet'; did you mean imagenet\\?",
        ),
        *(
            (
                ClassificationConfig,
                {"normalization": wrong},
                r"normalization must be 'dataset', 'imagenet' or a pair \(mean, std\)",
            )
            for wrong in (
                3,
                None,
                (),
                (0.5, 0.5),
                ((0.5,), (0.0,)),
                ((0.5,), (1.1,)),
                ((-0.5,), (0.5,)),
                ((0.5,), (float("nan"),)),
                ((0.5,), (0.5, 0.5)),
                ((0.5,), ("0.5",)),
                ((True,), (0.5,)),
                ((0.5, 0.5), (0.5, 0.5)),
                ((0.5,), (0.5,), (0.5,)),
                ((), ()),
                {"mean": (0.5,), "std": (0.5,)},
            )
        ),
    ],
)
def test_wrong_settings_are_refused(kind, settings, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        kind(**settings)


def test_the_norms_are_those_of_the_networks():
    known = typing.get_args(typing.get_type_hints(models.Layers)["norm"])
    hint = typing.get_type_hints(ClassificationConfig)["norm"]
    literal, _ = typing.get_args(hint)
    assert typing.get_args(literal) == known


def test_settings_are_the_same_from_json(weights):
    config = ClassificationConfig(
        weights=weights, normalization=RGB, norm="frozen_batch", freeze="backbone"
    )
    content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    assert from_json(ClassificationConfig, content) == config


def test_a_network_without_a_backbone_cannot_freeze_it(weights):
    config = SegmentationConfig(backbone_weights=weights, freeze="backbone")
    with pytest.raises(UsageError, match=r"^unet_small has no backbone: leave freeze"):
        open_task(config)


@pytest.mark.slow
def test_a_frozen_backbone_of_segmentation():
    config = SegmentationConfig(
        model="pspnet50", backbone_weights="weights", freeze="backbone"
    )
    task, _ = open_task(config)
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    _, params, rest = split(networks["model"])
    assert not any(name.startswith("backbone.") for name in names_of(params))
    assert "backbone.conv1.kernel" in names_of(rest)
    assert len(params) >= 2  # both heads


def test_norms_are_chosen():
    task, _ = open_task(ClassificationConfig(norm="group"))
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    assert isinstance(networks["model"].bn1, nnx.GroupNorm)
    task, _ = open_task(SegmentationConfig(norm="none"))
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    norms = (nnx.BatchNorm, nnx.GroupNorm)
    assert not any(isinstance(m, norms) for _, m in nnx.iter_modules(networks["model"]))


######## Normalization ################################################################


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (RGB, *RGB),
        (((0.1,), (0.9,)), (0.1,), (0.9,)),
    ],
)
@pytest.mark.parametrize("kind", [ClassificationConfig, SegmentationConfig])
def test_images_are_normalized_as_told(kind, normalization, mean, std):
    if kind is SegmentationConfig and len(mean) == 1:
        with pytest.raises(
            UsageError, match="one channel, but images of digit_scenes "
        ):
            open_task(kind(normalization=normalization))
        return
    task, dataset = open_task(kind(normalization=normalization))
    batch = dataset.split("test").read(range(2))
    expected = (batch["image"] / 255 - np.array(mean)) / np.array(std)
    for prepare in (task.prepare, lambda b, key: task.normalize(key, b)):
        found = prepare(batch, jax.random.key(0))["image"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    seen = []
    classes = len(task.class_names)

    def network(images):
        seen.append(images)
        shape = images.shape[:1] if kind is ClassificationConfig else images.shape[:3]
        return np.zeros((*shape, classes), np.float32)

    task.predict({"model": network}, batch["image"])
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)


def test_gray_images_and_rgb_weights_name_the_remedy(weights):
    for normalization in ("dataset", "imagenet"):
        config = ClassificationConfig(weights=weights, normalization=normalization)
        task, _ = open_task(config)
        networks = task.create_networks(nnx.Rngs(0))
        if normalization == "imagenet":
            task.load_weights(networks)
            continue
        with pytest.raises(
            UsageError, match="normalization 'imagenet' turns these gray"
        ):
            task.load_weights(networks)


def test_a_missing_file_has_no_hint_about_its_channels(tmp_path):
    task, _ = open_task(ClassificationConfig(weights=tmp_path / "none.safetensors"))
    with pytest.raises(UsageError, match=r"there is no file \S+none.safetensors$"):
        task.load_weights(task.create_networks(nnx.Rngs(0)))


HEADS = [
    # classes of the file, new_head, what is said of the head
    (10, False, "is kept from {}, with its classes"),
    (10, True, "starts anew, as new_head says"),
    (7, False, "starts anew, as {} has none for 10 classes"),
    (7, True, "starts anew, as new_head says"),
]


@pytest.mark.parametrize(("classes", "new_head", "said"), HEADS)
def test_a_head_that_fits_is_kept_unless_it_starts_anew(
    classes, new_head, said, tmp_path
):
    path = tmp_path / "weights.safetensors"
    pretrained = models.create("resnet8", num_classes=classes, rngs=nnx.Rngs(3))
    models.save_weights(pretrained, path)
    task, _ = open_task(
        ClassificationConfig(weights=path, new_head=new_head, normalization="imagenet")
    )
    networks, fresh = (task.create_networks(nnx.Rngs(0)) for _ in range(2))
    assert task.load_weights(networks) == f"the head (fc) {said.format(path)}"
    found = networks["model"]
    expected = pretrained if "kept" in said else fresh["model"]
    np.testing.assert_array_equal(found.fc.kernel, expected.fc.kernel)
    np.testing.assert_array_equal(found.conv1.kernel, pretrained.conv1.kernel)
