import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Layers
from models.pix2pix import Discriminator, Generator
from tests.shared import mean_of
from train.data.config import DataConfig
from train.errors import UsageError
from train.metrics import psnr, ssim
from train.optim.config import OptimizerConfig
from train.tasks import open_task, translation
from train.tasks.translation import Translation, TranslationConfig

RANDOM = np.random.default_rng(0)


def make_task(size=(16, 16), **config):
    return Translation(
        config=TranslationConfig(**config),
        size=size,
        in_channels=3,
        out_channels=3,
        augment=translation._scaled,
    )


def make_batch(n=2, size=(16, 16)):
    return {
        name: RANDOM.integers(0, 256, (n, *size, 3), np.uint8)
        for name in ("input", "target")
    }


def prepared(batch):
    return translation._scaled(jax.random.key(0), batch)


# A generator that halves the input; a discriminator that compares two channels.
SIMPLE = {
    "generator": lambda images: images / 2,
    "discriminator": lambda pair: pair[..., :1] - 2 * pair[..., 5:],
}


def logits_for(inputs, images):
    return inputs[..., :1] - 2 * images[..., 2:]


def scaled(batch):
    return (batch[name] / 127.5 - 1 for name in ("input", "target"))


def test_pairs_are_scaled_from_minus_one_to_one():
    batch = {"input": np.uint8([[0, 255]]), "target": np.uint8([[51]]), "label": 3}
    found = translation._scaled(jax.random.key(0), batch)
    np.testing.assert_allclose(found["input"], [[-1, 1]])
    np.testing.assert_allclose(found["target"], [[-0.6]], rtol=1e-6)
    assert found["label"] == 3


@pytest.mark.parametrize("kind", ["bce", "lsgan"])
def test_losses_are_those_of_the_paper(kind):
    task, batch = make_task(gan_loss=kind, l1_weight=10.0), make_batch()
    inputs, targets = scaled(batch)
    real, fake = logits_for(inputs, targets), logits_for(inputs, inputs / 2)

    def bce(logits, label):
        p = 1 / (1 + np.exp(-logits))
        return -np.log(p if label else 1 - p).mean()

    def squared(logits, label):
        return np.square(logits - label).mean()

    part = {"bce": bce, "lsgan": squared}[kind]
    found, metrics = task.loss("discriminator", SIMPLE, prepared(batch))
    assert mean_of(found) == pytest.approx(
        (part(real, 1) + part(fake, 0)) / 2, rel=1e-5
    )
    assert metrics == {}

    found, metrics = task.loss("generator", SIMPLE, prepared(batch))
    l1 = np.abs(inputs / 2 - targets).mean()
    assert mean_of(found) == pytest.approx(part(fake, 1) + 10 * l1, rel=1e-5)
    means = {name: total / count for name, (total, count) in metrics.items()}
    assert means == pytest.approx({"gan": part(fake, 1), "l1": l1 / 2}, rel=1e-5)


def test_each_loss_teaches_its_own_network():
    task, batch = make_task(), prepared(make_batch())

    def loss(name, scales):
        networks = {
            "generator": lambda x: scales["generator"] * x / 2,
            "discriminator": lambda x: scales["discriminator"] * x[..., 5:],
        }
        return mean_of(task.loss(name, networks, batch)[0])

    one = {"generator": 1.0, "discriminator": 1.0}
    grads = jax.grad(lambda s: loss("discriminator", s))(one)
    assert grads["generator"] == 0  # its images are constants there
    assert grads["discriminator"] != 0
    grads = jax.grad(lambda s: loss("generator", s))(one)
    assert grads["generator"] != 0


def small_networks(norm="batch", dtype=None):
    layers = Layers(rngs=nnx.Rngs(0), norm=norm, dtype=dtype)
    patches = (4, 4), (2, 1, 1), 1  # widths and strides, kernels of one pixel
    return {
        "discriminator": Discriminator(*patches, last_bias=True, layers=layers),
        "generator": Generator(3, width=4, layers=layers),
    }


@pytest.mark.parametrize(
    ("dtype", "norm"), [(None, "batch"), (jnp.bfloat16, "instance")]
)
@pytest.mark.parametrize("name", ["generator", "discriminator"])
@pytest.mark.slow
def test_networks_learn_a_batch(name, dtype, norm, descend):
    task, batch = make_task(l1_weight=10.0), make_batch()
    batch["target"] = 255 - batch["input"] // 8  # all bright
    losses = descend(
        task,
        small_networks(norm, dtype),
        name,
        prepared(batch),
        steps=25,
        learning_rate=1e-2,
    )
    assert losses[0].dtype == np.float32
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.95 * losses[0]


def test_scores_of_a_split_in_batches_with_filling():
    task, batch = make_task((12, 14)), make_batch(6)
    totals = None
    for rows in ([0, 1, 2, 3], [4, 5, 1, 1]):
        part = {k: v[rows] for k, v in batch.items()}
        weights = np.float32([1, 1, 1, 1] if rows[0] == 0 else [1, 1, 0, 0])
        found = task.evaluate(SIMPLE, part, weights)
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    inputs, targets = (x[:, 2:14, 1:15] for x in scaled(batch))
    fake, truth = ((x + 1) / 2 for x in (inputs / 2, targets))
    expected = {
        "l1": np.abs(fake - truth).mean(),
        "psnr": float(psnr(fake, truth).mean()),
        "ssim": float(ssim(fake, truth).mean()),
    }
    assert task.scores(jax.device_get(totals)) == pytest.approx(expected, rel=1e-4)


def test_predictions_are_images():
    batch = make_batch(2, (17, 20))
    found = make_task((16, 16)).predict(SIMPLE, batch["input"])
    assert found.dtype == jnp.uint8
    expected = (batch["input"][:, :16, 2:18] / 127.5 - 1) / 2
    np.testing.assert_allclose(found, (expected + 1) * 127.5, atol=0.51)


@pytest.mark.slow
def test_dropout_at_test_makes_images_differ():
    # A network of the catalogue: the smallest with dropout.
    def outputs(dropout_at_test):
        task = make_task((64, 64), dropout_at_test=dropout_at_test)
        networks = task.create_networks(nnx.Rngs(0))
        assert list(networks) == ["discriminator", "generator"]
        view = nnx.view(
            networks["generator"], deterministic=True, use_running_average=True
        )
        return [np.asarray(view(jnp.ones((1, 64, 64, 3)))) for _ in range(2)]

    first, second = outputs(False)
    np.testing.assert_array_equal(first, second)
    first, second = outputs(True)
    assert (first != second).any()


def test_the_generator_is_trained_with_techniques_and_both_if_asked():
    optimizer = OptimizerConfig(
        optimizer="adam", weight_decay=0.0, techniques=("scale_by_random",)
    )
    task = make_task(optimizer=optimizer)
    assert task.optimizer_config("generator") is optimizer
    found = task.optimizer_config("discriminator")
    assert found.techniques == ()
    assert (found.optimizer, found.weight_decay) == ("adam", 0.0)
    both = make_task(optimizer=optimizer, techniques_on="both")
    assert both.optimizer_config("discriminator") is optimizer


def test_defaults_are_the_papers():
    optimizer = TranslationConfig().optimizer
    assert (optimizer.optimizer, optimizer.learning_rate) == ("adam", 2e-4)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.5, 0)
    assert optimizer.schedule == "linear"


@pytest.mark.slow
def test_the_embedded_scenes(tmp_path):
    config = TranslationConfig(
        data=DataConfig(dataset="digit_scenes", augment=("random_flip",))
    )
    task, dataset = open_task(config)
    task.load_weights({})
    assert task.size == (64, 64)
    batch = dataset.split("test").read(range(8))
    ready = task.prepare(batch, jax.random.key(0))
    assert (ready["input"].min(), ready["input"].max()) == (-1, 1)
    # Both halves of a pair are flipped alike.
    inputs, targets = scaled(batch)
    flipped = ~np.isclose(ready["input"], inputs).all(axis=(1, 2, 3))
    assert 0 < flipped.sum() < 8
    expected = np.where(flipped.reshape(-1, 1, 1, 1), targets[:, :, ::-1], targets)
    np.testing.assert_allclose(ready["target"], expected, atol=1e-6)

    totals = jax.device_get(task.evaluate(SIMPLE, batch, np.ones(8, np.float32)))
    predictions = np.asarray(task.predict(SIMPLE, batch["input"]))
    task.save_figures(tmp_path, totals, batch, predictions)
    assert (tmp_path / "samples.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "unet128"}, "multiples of 128, got 64x64.*image_size"),
        (
            {"data": DataConfig(dataset="digit_scenes", crop=(65, 65))},
            "crop of 65x65 does not fit images of 64x64",
        ),
        (
            {"data": DataConfig(dataset="digit_scenes", augment=("color_jitter",))},
            "color_jitter changes what is to be predicted",
        ),
        ({"data": DataConfig(dataset="digits")}, "digits is for classification"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        open_task(TranslationConfig(**options))
