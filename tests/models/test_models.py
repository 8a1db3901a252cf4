import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import models
from models.cifar_resnet import CifarResNet


def _count(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", models.names())
def test_parameter_count_is_the_published_one(name):
    entry = models.describe(name)
    model = nnx.eval_shape(
        lambda: models.create(name, num_classes=entry.num_classes, rngs=nnx.Rngs(0))
    )
    assert _count(model) == entry.num_parameters


@pytest.mark.parametrize("size", [8, 12, 32])
def test_output_shape(size):
    model = models.create("resnet8", num_classes=7, rngs=nnx.Rngs(0), in_channels=1)
    assert model(jnp.zeros((2, size, size, 1))).shape == (2, 7)


def test_names_take_patterns():
    assert "resnet110" in models.names("resnet1*")
    assert models.names("no such*") == ()


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'resnet9'.*known: resnet8, resnet20"):
        models.create("resnet9", num_classes=10, rngs=nnx.Rngs(0))


def test_depth_that_fits_no_network_is_refused():
    with pytest.raises(ValueError, match=r"6 n \+ 2.*got 10"):
        CifarResNet(10, num_classes=10, rngs=nnx.Rngs(0))


def test_training_mode_uses_batch_statistics_and_evaluation_mode_running_ones():
    model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3)) + 3.0
    evaluated = nnx.view(model, use_running_average=True)
    before = evaluated(images)
    assert not jnp.allclose(model(images), before, atol=1e-3)
    # The first convolution sees a known batch: check one statistic by hand.
    activations = model.stem(images)
    expected = 0.1 * activations.mean(axis=(0, 1, 2))
    assert jnp.allclose(model.stem_norm.mean[...], expected, atol=1e-5)


def test_one_step_along_the_gradient_reduces_the_loss():
    model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    labels = jnp.arange(8)

    def loss(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    before, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    assert loss(model) < before
