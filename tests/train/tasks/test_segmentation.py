import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from optax_tricks.nnx import batch_gradients, split
from tests.shared import mean_of
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
    batch = task.normalize(jax.random.key(0), batch)
    loss, metrics = task.loss("model", networks, batch)
    return mean_of(loss), metrics


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
        return mean_of(task.loss("model", networks, batch)[0])

    assert jax.eval_shape(lambda s, b: loss(s, b, True), state, prepared).shape == ()
    with pytest.raises(TypeError, match="NoneType"):
        jax.eval_shape(lambda s, b: loss(s, b, False), state, prepared)


class Accumulated(models.Network):
    """A linear map of pixels, with auxiliary logits."""

    auxiliary_weight = 0.4

    def __init__(self, rngs):
        self.main = nnx.Linear(3, 3, rngs=rngs)
        self.auxiliary = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, images):
        return self.main(images)

    def with_auxiliary(self, images):
        return self.main(images), self.auxiliary(images)


def gradients_in_numpy(params, batch, class_weights):
    """Mean loss of a batch and its gradient, from the formulas in float64."""
    pixels = (batch["image"] / 255.0 - 0.5) / 0.25
    labeled = batch["mask"] != VOID
    pixels, labels = pixels[labeled], batch["mask"][labeled]
    weights = np.asarray(class_weights)[labels]
    total, grads = 0.0, {}
    for name, factor in (("main", 1.0), ("auxiliary", 0.4)):
        layer = {key: np.float64(value) for key, value in params[name].items()}
        logits = pixels @ layer["kernel"] + layer["bias"]
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        total -= (
            factor * (weights * np.log(shares[np.arange(len(labels)), labels])).sum()
        )
        errors = factor * weights[:, None] * (shares - np.eye(3)[labels])
        grads[name] = {"kernel": pixels.T @ errors, "bias": errors.sum(0)}
    count = weights.sum() or 1.0
    return total / count, jax.tree.map(lambda g: g / count, grads)


@pytest.mark.parametrize(
    ("ignored", "class_weights", "grad_accum_steps"),
    [
        ("some", (1.0, 1.0, 1.0), 4),
        ("some", (0.5, 3.0, 0.0), 1),
        ("some", (0.5, 3.0, 0.0), 2),
        ("some", (0.5, 3.0, 0.0), 4),
        ("whole images", (0.5, 3.0, 0.0), 4),
        ("whole part", (0.5, 3.0, 0.0), 2),
        ("all", (0.5, 3.0, 0.0), 2),
    ],
)
def test_parts_have_the_loss_and_gradients_of_the_whole_batch(
    ignored, class_weights, grad_accum_steps
):
    batch = make_batch(8)
    rows = {"some": [], "whole images": [0, 3, 5], "whole part": [1, 3, 5, 7]}
    batch["mask"][rows.get(ignored, slice(None))] = VOID
    task = make_task(class_weights)
    graphdef, params, model_state = split(Accumulated(nnx.Rngs(0)))
    found = batch_gradients(
        lambda model, batch: task.loss("model", {"model": model}, batch),
        graphdef,
        params,
        model_state,
        task.normalize(jax.random.key(0), batch),
        grad_accum_steps=grad_accum_steps,
    )
    loss, grads = gradients_in_numpy(params, batch, class_weights)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    chex.assert_trees_all_close(found.grads, grads, rtol=1e-4, atol=1e-6)
    elsewhere = jax.tree.map(lambda w: w + 0.1, params)
    _, grads = gradients_in_numpy(elsewhere, batch, class_weights)
    chex.assert_trees_all_close(
        found.grad_fn(elsewhere, 0), grads, rtol=1e-4, atol=1e-6
    )
    correct, count = found.aux["pixel_accuracy"]
    labeled = batch["mask"] != VOID
    assert count == labeled.sum()
    assert correct <= count


def test_a_batch_without_labels_has_no_loss_and_no_nan():
    batch = make_batch() | {"mask": np.full((4, 16, 16), VOID, np.uint8)}
    task = make_task()
    loss, metrics = loss_of(task, {"model": WithAuxiliary()}, batch)
    assert loss == 0
    assert metrics["pixel_accuracy"] == (0, 0)

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


def test_scores_of_many_large_photos():
    """240 photos of 12 megapixels, whose counts are beyond int32."""
    task = make_task((0.5, 3.0, 1.0))
    confusion = np.array([[2_000_000_000, 1, 0], [1, 879_999_998, 0], [0, 0, 0]])
    weight = 0.5 * 2_000_000_001 + 3.0 * 879_999_999
    scores = task.scores({"confusion": confusion, "loss": np.float64(0.25 * weight)})
    assert scores["pixel_accuracy"] == pytest.approx(1 - 2 / 2_880_000_000, rel=1e-12)
    assert scores["loss"] == pytest.approx(0.25, rel=1e-12)
    assert scores["iou_road"] == pytest.approx(1 - 2 / 880_000_000, rel=1e-12)


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

    said = unet.load_weights({"model": WithBackbone})
    assert said == f"the backbone is that of {path}, and the head starts anew"
    np.testing.assert_array_equal(
        WithBackbone.backbone.conv1.kernel.get_value(), wrong.conv1.kernel.get_value()
    )
    missing = make_task(backbone_weights=tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"^backbone_weights: there is no file"):
        missing.load_weights({"model": WithBackbone})
    assert make_task().load_weights({}) == ""


def test_a_crop_larger_than_the_images_is_refused():
    data = DataConfig(
        dataset="digit_scenes", augment=("random_scale_crop",), crop=(64, 65)
    )
    with pytest.raises(UsageError, match="crop of 64x65 does not fit images of 64x64"):
        open_task(SegmentationConfig(data=data))
