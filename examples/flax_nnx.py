"""Flax NNX: a network with BatchNorm and dropout, trained with PUGD.

The model is split once into arrays, which is the fastest way to train an NNX model.

Needs optax_tricks[nnx] and scikit-learn.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_tricks
from optax_tricks.nnx import batch_gradients, split

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
    return losses.mean(), None  # any auxiliary output in place of None


graphdef, params, model_state = split(Network(nnx.Rngs(0)))
tx = optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 100), weight_decay=5e-4)
opt_state = tx.init(params)


@jax.jit
def step(params, model_state, opt_state, batch):
    out = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    updates, opt_state = tx.update(out.grads, opt_state, params, grad_fn=out.grad_fn)
    return optax.apply_updates(params, updates), out.model_state, opt_state, out.loss


for epoch in range(10):
    order = jax.random.permutation(jax.random.key(epoch), 1000)
    for rows in order.reshape(-1, 100):
        batch = images[rows], labels[rows]
        params, model_state, opt_state, loss = step(
            params, model_state, opt_state, batch
        )
    print(f"epoch {epoch + 1}: training loss {loss:.3f}")

model = nnx.merge(graphdef, params, model_state)
model.eval()
accuracy = jnp.mean(model(images[1000:]).argmax(-1) == labels[1000:])
print(f"test accuracy {accuracy:.3f}")
