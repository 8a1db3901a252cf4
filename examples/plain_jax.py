"""Plain JAX: a small network on handwritten digits, with any of the techniques.

Needs optax_tricks and scikit-learn.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_tricks

digits = load_digits()
inputs = jnp.array(digits.data / 16, jnp.float32)  # (1797, 64)
labels = jnp.array(digits.target)
train_inputs, test_inputs = inputs[:1000], inputs[1000:]
train_labels, test_labels = labels[:1000], labels[1000:]


def init(key):
    hidden_key, head_key = jax.random.split(key)
    initializer = jax.nn.initializers.he_normal()
    return {
        "hidden": {"w": initializer(hidden_key, (64, 128)), "b": jnp.zeros(128)},
        "head": {"w": initializer(head_key, (128, 10)), "b": jnp.zeros(10)},
    }


def network(params, inputs):
    hidden = jax.nn.relu(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


def loss(params, batch):
    inputs, labels = batch
    logits = network(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, epochs=15, batch_size=100):
    # Now every transform takes grad_fn, and those with one gradient ignore it.
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, batch):
        def grad_fn(params, step):
            return jax.grad(loss)(params, batch)

        grads = grad_fn(params, 0)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = init(jax.random.key(0))
    state = tx.init(params)
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(train_inputs))
        for rows in order.reshape(-1, batch_size):
            batch = train_inputs[rows], train_labels[rows]
            params, state = step(params, state, batch)
    logits = network(params, test_inputs)
    return jnp.mean(logits.argmax(-1) == test_labels)


optimizers = {
    "SGD": optax.sgd(0.1, momentum=0.9),
    "Gradient Centralization": optax.chain(
        optax_tricks.centralize(), optax.sgd(0.1, momentum=0.9)
    ),
    "Random Gradient": optax.chain(
        optax_tricks.scale_by_random(key=0), optax.sgd(0.2, momentum=0.5)
    ),
    "Step-Tuned SGD": optax_tricks.step_tuned_sgd(1.0),
    "PUGD": optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 150)),
}
# One seed does not show which of them is better.
for name, tx in optimizers.items():
    print(f"{name}: test accuracy {train(tx):.3f}")
