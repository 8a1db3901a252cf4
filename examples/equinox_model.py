"""Equinox: a network with BatchNorm and dropout, with centralized PUGD.

Kernels of Equinox have the layout of PyTorch, so `centralize` is told "oi...".

Needs optax_tricks, Equinox and scikit-learn.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_tricks

digits = load_digits()
images = jnp.array(digits.images[:, None] / 16, jnp.float32)  # (1797, 1, 8, 8)
labels = jnp.array(digits.target)


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    pool: eqx.nn.MaxPool2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        conv_key, head_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 16, 3, padding=1, key=conv_key)
        self.norm = eqx.nn.BatchNorm(16, "batch", momentum=0.9, mode="batch")
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(256, 10, key=head_key)

    def __call__(self, image, state, key=None):
        x, state = self.norm(self.conv(image), state)
        x = self.pool(jax.nn.relu(x)).ravel()
        return self.head(self.dropout(x, key=key)), state


model, model_state = eqx.nn.make_with_state(Network)(jax.random.key(0))
# The arrays to train, and everything else.
params, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params, model_state, batch, dropout_key):
    images, labels = batch
    model = eqx.combine(params, static)
    keys = jax.random.split(dropout_key, len(images))
    over_batch = jax.vmap(
        model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None)
    )
    logits, model_state = over_batch(images, model_state, keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), model_state


schedule = optax.cosine_decay_schedule(0.1, 100)
tx = optax.chain(
    optax_tricks.perturbed_unit_step(),  # a second gradient comes first
    optax_tricks.centralize("oi..."),
    optax.sgd(schedule, momentum=0.9),
)
opt_state = tx.init(params)


@eqx.filter_jit
def step(params, model_state, opt_state, batch, dropout_key):
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, new_state), grads = gradient(params, model_state, batch, dropout_key)

    def grad_fn(params, step):
        # The same batch, the same dropout key, and the new statistics are dropped.
        return gradient(params, model_state, batch, dropout_key)[1]

    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(params, updates), new_state, opt_state, loss


for epoch in range(10):
    epoch_key = jax.random.key(epoch)
    order = jax.random.permutation(epoch_key, 1000).reshape(-1, 100)
    for rows, dropout_key in zip(order, jax.random.split(epoch_key, 10), strict=True):
        batch = images[rows], labels[rows]
        params, model_state, opt_state, loss = step(
            params, model_state, opt_state, batch, dropout_key
        )
    print(f"epoch {epoch + 1}: training loss {loss:.3f}")

model = eqx.nn.inference_mode(eqx.combine(params, static))
logits, _ = jax.vmap(model, in_axes=(0, None))(images[1000:], model_state)
accuracy = jnp.mean(logits.argmax(-1) == labels[1000:])
print(f"test accuracy {accuracy:.3f}")
