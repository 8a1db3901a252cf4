"""Flax NNX with `nnx.Optimizer`: one gradient, then two gradients.

Gradient Centralization needs nothing new. PUGD evaluates a second gradient, which
must repeat the dropout masks and must not move the BatchNorm statistics.

Needs optax_tricks[nnx] and scikit-learn.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_tricks
from optax_tricks.nnx import batch_gradients

digits = load_digits()
images = jnp.array(digits.images[..., None] / 16, jnp.float32)  # (1797, 8, 8, 1)
labels = jnp.array(digits.target)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model, batch):
    images, labels = batch
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), None


@nnx.jit
def one_gradient(model, optimizer, batch):
    grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
    optimizer.update(model, grads)


@nnx.jit
def two_gradients(model, optimizer, batch):
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    out = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    nnx.update(model, out.model_state)
    optimizer.update(model, out.grads, grad_fn=out.grad_fn)


def train(tx, step):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for epoch in range(10):
        order = jax.random.permutation(jax.random.key(epoch), 1000)
        for rows in order.reshape(-1, 100):
            step(model, optimizer, (images[rows], labels[rows]))
    model.eval()
    return jnp.mean(model(images[1000:]).argmax(-1) == labels[1000:])


tx = optax.chain(optax_tricks.centralize(), optax.sgd(0.1, momentum=0.9))
print(f"Gradient Centralization: test accuracy {train(tx, one_gradient):.3f}")

tx = optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 100), weight_decay=5e-4)
print(f"PUGD: test accuracy {train(tx, two_gradients):.3f}")
