"""Tasks trained without the loop."""

import jax
import optax
import pytest
from flax import nnx

from tests.shared import mean_of


@pytest.fixture
def descend():
    """Takes steps on one prepared batch; returns the loss before each."""

    def descend(task, networks, name, batch, *, steps, learning_rate=3e-3):
        graphdef, params, rest = nnx.split(networks[name], nnx.Param, ...)
        others = nnx.split({k: v for k, v in networks.items() if k != name})
        tx = optax.adam(learning_rate)

        @jax.jit
        def step(params, opt_state):
            def loss(params):
                network = nnx.merge(graphdef, params, rest, copy=True)
                networks = nnx.merge(*others, copy=True) | {name: network}
                return mean_of(task.loss(name, networks, batch)[0])

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state)
            return value, optax.apply_updates(params, updates), opt_state

        opt_state, losses = tx.init(params), []
        for _ in range(steps):
            value, params, opt_state = step(params, opt_state)
            losses.append(value)
        return jax.device_get(losses)

    return descend
