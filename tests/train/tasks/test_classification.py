import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.shared import mean_of
from train.data import augment
from train.data.config import DataConfig
from train.errors import UsageError
from train.tasks import open_task
from train.tasks.classification import Classification, ClassificationConfig

RANDOM = np.random.default_rng(0)


def make_task(classes=7, **config):
    normalize = augment.normalize((0.5,), (0.25,))
    return Classification(
        config=ClassificationConfig(**config),
        class_names=tuple(map(str, range(classes))),
        image_shape=(8, 8, 1),
        augment=augment.chain(augment.random_flip(), normalize),
        normalize=normalize,
    )


def make_batch(n=12, classes=7):
    return {
        "image": RANDOM.integers(0, 256, (n, 8, 8, 1), np.uint8),
        "label": RANDOM.integers(0, classes, n),
    }


def linear(classes=7):
    """A network whose logits are easily computed: pixels of the image."""
    return {"model": lambda images: images.reshape(len(images), -1)[:, :classes]}


def logits_of(batch, classes=7):
    image = batch["image"].astype(np.float64)
    return ((image / 255 - 0.5) / 0.25).reshape(len(image), -1)[:, :classes]


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy(smoothing):
    task, batch = make_task(label_smoothing=smoothing), make_batch()
    prepared = task.normalize(jax.random.key(0), batch)
    loss, metrics = task.loss("model", linear(), prepared)
    logits, labels = logits_of(batch), batch["label"]
    logp = log_softmax(logits)
    own = logp[np.arange(12), labels]
    expected = -((1 - smoothing) * own + smoothing * logp.mean(-1)).mean()
    assert mean_of(loss) == pytest.approx(expected, rel=1e-5)
    total, count = metrics["accuracy"]
    assert (total, count) == ((logits.argmax(-1) == labels).sum(), 12)


def test_scores_of_a_split_in_batches_with_filling():
    task, batch = make_task(), make_batch(30)
    logits, labels = logits_of(batch), batch["label"]
    totals = None
    for rows in (range(12), range(12, 24), (*range(24, 30), *[3] * 6)):
        part = {k: v[list(rows)] for k, v in batch.items()}
        weights = np.ones(12, np.float32)
        if rows[-1] == 3:
            weights[6:] = 0
        found = task.evaluate(linear(), part, weights)
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    totals = jax.device_get(totals)
    top = np.argsort(-logits, kind="stable")
    scores = task.scores(totals)
    assert scores == pytest.approx(
        {
            "loss": -log_softmax(logits)[np.arange(30), labels].mean(),
            "accuracy": (top[:, 0] == labels).mean(),
            "top5": (top[:, :5] == labels[:, None]).any(-1).mean(),
        },
        rel=1e-5,
    )
    assert 0 < scores["accuracy"] < scores["top5"] < 1
    assert totals["confusion"].sum() == 30
    for truth, predicted in np.ndindex(7, 7):
        pairs = (labels == truth) & (top[:, 0] == predicted)
        assert totals["confusion"][truth, predicted] == pairs.sum()


def test_up_to_five_classes_have_no_top5():
    task, batch = make_task(5), make_batch(classes=5)
    totals = jax.device_get(task.evaluate(linear(5), batch, np.ones(12, np.float32)))
    assert set(task.scores(totals)) == {"loss", "accuracy"}


def test_predictions_are_probabilities():
    batch = make_batch()
    found = make_task().predict(linear(), batch["image"])
    assert found.dtype == jnp.float32
    expected = np.exp(log_softmax(logits_of(batch)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_network_learns_a_batch(precision, descend):
    task, batch = make_task(precision=precision), make_batch()
    networks = task.create_networks(nnx.Rngs(0))
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(networks, nnx.Param))}
    assert dtypes == {jnp.dtype("float32")}
    prepared = task.prepare(batch, jax.random.key(0))
    losses = descend(task, networks, "model", prepared, steps=12)
    assert losses[0].dtype == np.float32
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def file_of(path, classes, name="resnet8"):
    model = models.create(name, num_classes=classes, in_channels=1, rngs=nnx.Rngs(7))
    models.save_weights(model, path)
    return model


@pytest.mark.parametrize("classes", [7, 9])
def test_fine_tuning_takes_the_head_only_if_it_fits(classes, tmp_path):
    path = tmp_path / "weights.safetensors"
    there = file_of(path, classes)
    task = make_task(weights=path)
    networks = task.create_networks(nnx.Rngs(0))
    fresh = networks["model"].fc.kernel.get_value()
    task.load_weights(networks)
    model = networks["model"]
    np.testing.assert_array_equal(
        model.conv1.kernel.get_value(), there.conv1.kernel.get_value()
    )
    expected = there.fc.kernel.get_value() if classes == 7 else fresh
    np.testing.assert_array_equal(model.fc.kernel.get_value(), expected)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    file_of(path, 7, "resnet20")
    for wrong, message in (
        (path, "^weights: .* does not fit this ResNet"),
        (tmp_path / "none.safetensors", "^weights: there is no file"),
    ):
        task = make_task(weights=wrong)
        with pytest.raises(UsageError, match=message):
            task.load_weights(task.create_networks(nnx.Rngs(0)))


def test_without_weights_nothing_is_loaded():
    make_task().load_weights({})


@pytest.mark.slow
def test_the_embedded_digits(tmp_path):
    config = ClassificationConfig()
    task, dataset = open_task(config)
    assert task.image_shape == (8, 8, 1)
    assert task.optimizer_config("model") is config.optimizer
    batch = dataset.split("test").read(range(40))
    networks = nnx.view(task.create_networks(nnx.Rngs(0)), use_running_average=True)
    totals = jax.device_get(task.evaluate(networks, batch, np.ones(40, np.float32)))
    predictions = task.predict(networks, batch["image"])
    assert predictions.shape == (40, 10)
    task.save_figures(tmp_path, totals, batch, predictions)
    assert (tmp_path / "confusion_matrix.png").read_bytes()[1:4] == b"PNG"


def test_cropped_images_are_evaluated_at_the_size_of_the_crop():
    task, dataset = open_task(ClassificationConfig(data=DataConfig(crop=(6, 7))))
    batch = dataset.split("train").read(range(2))
    seen = []
    networks = {"model": lambda x: seen.append(x.shape) or jnp.zeros((2, 10))}
    task.predict(networks, batch["image"])
    task.loss("model", networks, task.prepare(batch, jax.random.key(0)))
    assert seen == [(2, 6, 7, 1)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "vgg11_bn"},
            "cannot take these images: .*at least 32x32.*image_size",
        ),
        ({"data": DataConfig(crop=(9, 8))}, "crop of 9x8 does not fit images of 8x8"),
        ({"data": DataConfig(dataset="digit_scenes")}, "not for classification"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        open_task(ClassificationConfig(**options))
