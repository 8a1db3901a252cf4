"""Flax Linen: a network with BatchNorm and dropout, trained with PUGD.

Needs optax_tricks[nnx] and scikit-learn.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_tricks

digits = load_digits()
images = jnp.array(digits.images[..., None] / 16, jnp.float32)  # (1797, 8, 8, 1)
labels = jnp.array(digits.target)


class Network(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(16, (3, 3))(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


network = Network()


def loss_fn(params, batch_stats, batch, dropout_key):
    images, labels = batch
    logits, updated = network.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated["batch_stats"]


variables = network.init(jax.random.key(0), images[:1], train=False)
params, batch_stats = variables["params"], variables["batch_stats"]
tx = optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 100), weight_decay=5e-4)
opt_state = tx.init(params)


@jax.jit
def step(params, batch_stats, opt_state, batch, dropout_key):
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, new_stats), grads = gradient(params, batch_stats, batch, dropout_key)

    def grad_fn(params, step):
        # The same batch, the same dropout key, and the new statistics are dropped.
        return gradient(params, batch_stats, batch, dropout_key)[1]

    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), new_stats, opt_state, loss


for epoch in range(10):
    epoch_key = jax.random.key(epoch)
    order = jax.random.permutation(epoch_key, 1000).reshape(-1, 100)
    for rows, dropout_key in zip(order, jax.random.split(epoch_key, 10), strict=True):
        batch = images[rows], labels[rows]
        params, batch_stats, opt_state, loss = step(
            params, batch_stats, opt_state, batch, dropout_key
        )
    print(f"epoch {epoch + 1}: training loss {loss:.3f}")

variables = {"params": params, "batch_stats": batch_stats}
logits = network.apply(variables, images[1000:], train=False)
accuracy = jnp.mean(logits.argmax(-1) == labels[1000:])
print(f"test accuracy {accuracy:.3f}")
