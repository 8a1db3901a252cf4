"""`nnx.Optimizer` drives every transform."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.optax_tricks.table import (
    Row,
    assert_close,
    every_row,
)

pytest.importorskip("flax")
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


def net_loss(net: Net) -> jax.Array:
    return jnp.mean((net(jnp.ones((2, 3))) - 1) ** 2)


GRAPHDEF = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


@jax.jit
def net_grad(params: Any, step: int) -> Any:
    del step
    return jax.grad(lambda p: net_loss(nnx.merge(GRAPHDEF, p)))(params)


@every_row
def test_nnx_optimizer(row: Row) -> None:
    net, tx = Net(nnx.Rngs(0)), row.optimizer()
    before = net_loss(net)
    extra = dict.fromkeys(row.extra, net_grad)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        optimizer.update(net, nnx.grad(net_loss)(net), **extra)
        updates, state = tx.update(net_grad(params, 0), state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert_close(nnx.to_pure_dict(nnx.state(net, nnx.Param)), params)
    assert net_loss(net) < before
