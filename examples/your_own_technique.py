"""A technique of your own: an optax transform with a second gradient and a log.

The extragradient method takes the gradient after a trial step, and makes the step from
where it started. It chains with every other transform.

Needs optax_tricks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_tricks


class ExtragradientState(NamedTuple):
    cosine: jax.Array  # of the angle between both gradients


def extragradient(trial_rate):
    """Replaces the gradient by that after a trial step of SGD."""

    def init(params):
        return ExtragradientState(cosine=jnp.ones(()))

    def update(grads, state, params=None, *, grad_fn, **extra_args):
        trial = jax.tree.map(lambda w, g: w - trial_rate * g, params, grads)
        second = grad_fn(trial, 0)
        norms = optax.tree.norm(grads) * optax.tree.norm(second)
        cosine = optax.tree.vdot(grads, second) / norms
        return second, ExtragradientState(cosine)

    return optax.GradientTransformationExtraArgs(init, update)


def loss(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["hidden"])
    return jnp.mean((hidden @ params["head"] - targets) ** 2)


# Targets that a network of the same form makes.
key, *keys = jax.random.split(jax.random.key(0), 6)
teacher = {
    "hidden": jax.random.normal(keys[0], (8, 16)) / 3,
    "head": jax.random.normal(keys[1], (16, 1)),
}
inputs = jax.random.normal(keys[2], (512, 8))
targets = jnp.tanh(inputs @ teacher["hidden"]) @ teacher["head"]

params = {
    "hidden": jax.random.normal(keys[3], (8, 16)) / 3,
    "head": jax.random.normal(keys[4], (16, 1)) / 4,
}
tx = optax.chain(
    extragradient(trial_rate=0.05),
    optax_tricks.centralize(),
    optax.sgd(0.05, momentum=0.9),
)
state = tx.init(params)


@jax.jit
def step(params, state, batch):
    def grad_fn(params, step):
        return jax.grad(loss)(params, batch)

    updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


for count in range(500):
    rows = jax.random.randint(jax.random.fold_in(key, count), (64,), 0, 512)
    params, state = step(params, state, (inputs[rows], targets[rows]))
    if count % 100 == 0:
        logs = optax_tricks.logged_scalars(state)
        print(
            f"step {count}: loss {loss(params, (inputs, targets)):.3f}, "
            f"cosine {logs['cosine']:.3f}"
        )
print(f"last loss {loss(params, (inputs, targets)):.3f}")
