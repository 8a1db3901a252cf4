"""What the tests of chains share: parameters, a loss, and steps on it."""

import jax
import jax.numpy as jnp
import optax

from train.optim.config import OptimizerConfig
from train.optim.optimizer import make_optimizer

KEY = jax.random.key(0)
PARAMS = {
    "conv": {"kernel": jnp.linspace(-1.0, 2.0, 36).reshape(3, 3, 2, 2)},
    "attention": {
        "query": {
            "kernel": jnp.linspace(1.0, 3.0, 24).reshape(4, 2, 3),
            "bias": jnp.full((2, 3), 0.5, jnp.float32),
        }
    },
    "classifier": {
        6: {
            "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
            "bias": jnp.array([1.0, 2.0]),
        }
    },
}
HEAD = PARAMS["classifier"][6]
SMALL = {"conv": PARAMS["conv"], "bias": HEAD["bias"]}


def loss(params):
    return sum(jnp.sum(jnp.sin(w) + w**3 / 9) for w in jax.tree.leaves(params))


def grad_fn(params, step):
    return jax.grad(loss)(params)


def config(*techniques, **changes):
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant"}
    return OptimizerConfig(techniques=techniques, **settings | changes)


def build(config, **changes):
    settings = {"total_steps": 100, "steps_per_epoch": 10, "key": KEY}
    return make_optimizer(config, **settings | changes)


def run(tx, steps, grad_fn=grad_fn, params=PARAMS):
    """Takes steps; returns the parameters and the state after them."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn, value=0.0
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state
