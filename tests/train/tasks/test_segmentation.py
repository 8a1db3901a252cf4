import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from train.data import augment
from train.data.config import DataConfig
from train.errors import UsageError
from train.plots import class_colors
from train.tasks import open_task, segmentation
from train.tasks.segmentation import Segmentation, SegmentationConfig

RANDOM = np.random.default_rng(0)
NAMES = ("sky", "road", "tree")
VOID = 11


def make_task(class_weights=(1.0, 1.0, 1.0), **config):
    normalize = augment.normalize((0.5,) * 3, (0.25,) * 3)
    return Segmentation(
        config=SegmentationConfig(**config),
        class_names=NAMES,
        colors=class_colors(3),
        class_weights=class_weights,
        ignore_label=VOID,
        in_channels=3,
        augment=augment.chain(augment.random_flip(), normalize),
        normalize=normalize,
    )


def make_batch(n=4, size=(16, 16)):
    mask = RANDOM.integers(0, 4, (n, *size), np.uint8)
    return {
        "image": RANDOM.integers(0, 256, (n, *size, 3), np.uint8),
        "mask": np.where(mask == 3, VOID, mask).astype(np.uint8),
    }


class Network:
    """A network without auxiliary logits, from a function."""

    backbone = None

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, images):
        return self.logits(images)

    def with_auxiliary(self, images):
        return self(images), None


class WithAuxiliary(Network):
    """Its logits are the image, and the negative image."""

    auxiliary_weight = 0.4

    def __init__(self):
        super().__init__(lambda images: images)

    def with_auxiliary(self, images):
        return images, -images


IDENTITY = {"model": Network(lambda images: images)}


def losses_of(batch, weights=(1, 1, 1), sign=1):
    """Weighted cross-entropy of each pixel, and the weights."""
    logits = sign * (batch["image"] / 255.0 - 0.5) / 0.25
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses, used = np.zeros(logits.shape[:3]), np.zeros(logits.shape[:3])
    for index in np.ndindex(losses.shape):
        label = batch["mask"][index]
        if label != VOID:
            losses[index] = -weights[label] * logp[(*index, label)]
            used[index] = weights[label]
    return losses, used


def loss_of(task, networks, batch):
    return task.loss("model", networks, task.normalize(jax.random.key(0), batch))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 3.0, 0.0)])
def test_loss_is_the_mean_over_labeled_pixels(weights):
    batch = make_batch()
    loss, metrics = loss_of(make_task(weights), IDENTITY, batch)
    losses, used = losses_of(batch, weights)
    assert loss == pytest.approx(losses.sum() / used.sum(), rel=1e-5)
    assert loss.dtype == jnp.float32
    correct, count = metrics["pixel_accuracy"]
    assert count == (batch["mask"] != VOID).sum()
    assert correct == (batch["mask"] == batch["image"].argmax(-1)).sum()


def test_auxiliary_logits_add_four_tenths_of_their_loss():
    batch = make_batch()
    loss, _ = loss_of(make_task(), {"model": WithAuxiliary()}, batch)
    main, auxiliary = (losses_of(batch, sign=sign) for sign in (1, -1))
    expected = main[0].sum() / main[1].sum() + 0.4 * (
        auxiliary[0].sum() / auxiliary[1].sum()
    )
    assert loss == pytest.approx(expected, rel=1e-5)


def test_pspnet_has_its_auxiliary_loss():
    task = make_task(model="pspnet50")
    networks = nnx.eval_shape(lambda: task.create_networks(nnx.Rngs(0)))
    graphdef, state = nnx.split(networks)
    prepared = task.normalize(jax.random.key(0), make_batch(2, (16, 20)))

    def loss(state, batch, used):
        networks = nnx.merge(graphdef, state)
        if not used:
            networks["model"].auxiliary_head = None
        return task.loss("model", networks, batch)[0]

    assert jax.eval_shape(lambda s, b: loss(s, b, True), state, prepared).shape == ()
    with pytest.raises(TypeError, match="NoneType"):
        jax.eval_shape(lambda s, b: loss(s, b, False), state, prepared)


def test_a_batch_without_labels_has_no_loss_and_no_nan():
    batch = make_batch() | {"mask": np.full((4, 16, 16), VOID, np.uint8)}
    task = make_task()
    loss, metrics = loss_of(task, {"model": WithAuxiliary()}, batch)
    assert loss == 0
    total, count = metrics["pixel_accuracy"]
    assert total / count == 0

    def scaled(factor):
        networks = {"model": Network(lambda images: factor * images)}
        return loss_of(task, networks, batch)[0]

    assert jax.grad(scaled)(1.0) == 0
    scores = task.scores(
        jax.device_get(task.evaluate(IDENTITY, batch, np.ones(4, np.float32)))
    )
    assert scores == {"loss": 0, "mean_iou": 0, "pixel_accuracy": 0}


def test_scores_of_a_split_in_batches_with_filling():
    task, batch = make_task((0.5, 3.0, 1.0)), make_batch(6)
    batch["mask"][batch["mask"] == 2] = VOID  # never there, but predicted
    totals = None
    for rows in ([0, 1, 2, 3], [4, 5, 0, 0]):
        part = {k: v[rows] for k, v in batch.items()}
        weights = np.float32([1, 1, 1, 1] if rows[-1] else [1, 1, 0, 0])
        found = task.evaluate(IDENTITY, part, weights)
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    scores = task.scores(jax.device_get(totals))

    losses, used = losses_of(batch, (0.5, 3.0, 1.0))
    truth, predicted = batch["mask"], batch["image"].argmax(-1)
    there = truth != VOID
    iou = [
        ((truth == c) & (predicted == c)).sum()
        / (there & ((truth == c) | (predicted == c))).sum()
        for c in range(3)
    ]
    assert iou[2] == 0
    assert scores == pytest.approx(
        {
            "loss": losses.sum() / used.sum(),
            "mean_iou": np.mean(iou),
            "pixel_accuracy": (truth == predicted)[there].mean(),
            "iou_sky": iou[0],
            "iou_road": iou[1],
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("size", [(16, 24), (13, 18)])
def test_images_of_any_size_are_segmented_at_full_size(size):
    batch = make_batch(2, size)
    seen = []

    def network(images):
        seen.append(images.shape)
        return images

    found = make_task().predict({"model": network}, batch["image"])
    assert seen == [(2, 16, 24, 3)]
    assert found.dtype == jnp.int32
    normalized = make_task().normalize(jax.random.key(0), batch)["image"]
    np.testing.assert_array_equal(found, normalized.argmax(-1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_network_learns_a_batch(precision, descend):
    task, batch = make_task(precision=precision), make_batch(2)
    networks = task.create_networks(nnx.Rngs(0))
    # Something to see: the class is the brightness.
    batch["image"] = np.repeat(60 * batch["mask"][..., None], 3, -1).astype(np.uint8)
    prepared = task.prepare(batch, jax.random.key(0))
    losses = descend(task, networks, "model", prepared, steps=15, learning_rate=1e-2)
    assert losses[0].dtype == np.float32
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def test_balanced_weights_are_median_frequency_over_frequency():
    found = segmentation._balanced(np.array([100, 0, 10, 1000]))
    assert found.tolist() == [1, 0, 10, 0.1]


@pytest.mark.slow
def test_the_embedded_scenes(tmp_path):
    config = SegmentationConfig(
        class_weights="balanced",
        data=DataConfig(
            dataset="digit_scenes", augment=("random_scale_crop",), crop=(56, 64)
        ),
    )
    task, dataset = open_task(config)
    assert len(task.class_weights) == 11
    assert task.class_weights[0] == min(task.class_weights)  # background
    assert task.optimizer_config("model") is config.optimizer
    assert config.optimizer.schedule == "poly"

    batch = dataset.split("test").read(range(8))
    prepared = task.prepare(batch, jax.random.key(0))
    assert prepared["image"].shape == (8, 56, 64, 3)
    assert prepared["mask"].shape == (8, 56, 64)
    assert (prepared["mask"] == task.ignore_label).any()  # beyond the scene

    networks = {"model": lambda images: jnp.zeros((*images.shape[:3], 11))}
    totals = jax.device_get(task.evaluate(networks, batch, np.ones(8, np.float32)))
    assert totals["confusion"].sum() == 8 * 64 * 64
    assert task.scores(totals)["loss"] == pytest.approx(np.log(11), rel=1e-5)
    predictions = np.asarray(task.predict(networks, batch["image"]))
    assert predictions.shape == (8, 64, 64)
    task.save_figures(tmp_path, totals, batch, predictions)
    for name in ("samples.png", "iou.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("split", ["train", "test"])
def test_mask_values_that_are_no_class_are_named(split):
    config = SegmentationConfig()
    dataset = config.data.load("segmentation")
    counts = {name: found.copy() for name, found in dataset.class_counts.items()}
    counts[split][[12, 14]] = 7, 2
    counts[split][dataset.split("train").reader.ignore_label] = 5
    strange = dataclasses.replace(dataset, class_counts=counts)
    message = (
        rf"masks of digit_scenes \({split}\) have the values 12, 14, but there are 11"
    )
    with pytest.raises(UsageError, match=message):
        Segmentation.create(config, strange)
    Segmentation.create(config, dataset)


def test_backbone_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    wrong = models.create("resnet8", num_classes=3, rngs=nnx.Rngs(0))
    models.save_weights(wrong, path)
    unet = make_task(backbone_weights=path)
    with pytest.raises(UsageError, match="unet_small has no backbone"):
        unet.load_weights({"model": WithAuxiliary()})

    class WithBackbone:
        backbone = models.create("resnet8", num_classes=5, rngs=nnx.Rngs(1))

    unet.load_weights({"model": WithBackbone})
    np.testing.assert_array_equal(
        WithBackbone.backbone.conv1.kernel.get_value(), wrong.conv1.kernel.get_value()
    )
    missing = make_task(backbone_weights=tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"^backbone_weights: there is no file"):
        missing.load_weights({"model": WithBackbone})
    make_task().load_weights({})  # nothing to load


def test_a_crop_larger_than_the_images_is_refused():
    data = DataConfig(
        dataset="digit_scenes", augment=("random_scale_crop",), crop=(64, 65)
    )
    with pytest.raises(UsageError, match="crop of 64x65 does not fit images of 64x64"):
        open_task(SegmentationConfig(data=data))
