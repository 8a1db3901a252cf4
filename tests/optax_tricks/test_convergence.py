"""The transforms find minima of known functions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optax_tricks.table import (
    OPTIMIZERS,
    ROWS,
    Row,
    parametrize,
)

# Start, minimum, function. The means over the inputs of a unit agree in start and
# minimum of the matrix, since centralization keeps them.
TARGETS = {
    "parabola": (
        jnp.array([-1.0, 10.0, 1.0]),
        jnp.array([1.0, -1.0, 1.0]),
        lambda w: jnp.sum((w - jnp.array([1.0, -1.0, 1.0])) ** 2),
    ),
    "matrix": (
        jnp.array([[0.0, 3.0], [1.0, -1.0], [2.0, 1.0]]),
        jnp.array([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]),
        lambda w: jnp.sum((w - jnp.array([[2.0], [1.0], [0.0]])) ** 2),
    ),
    "rosenbrock": (
        jnp.array([0.0, 0.0]),
        jnp.array([1.0, 1.0]),
        lambda w: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2,
    ),
}
# Learning rate on the quadratic targets and on the valley, and tolerance there: the
# unit-length perturbation of PUGD sees far beyond its walls, so that it ends on the
# valley's floor but not in its minimum.
SETTINGS = {
    "random": (0.1, 1e-3, 0.02),
    "random-half": (0.1, 1e-3, 0.02),
    "centralize": (0.1, 1e-3, 0.02),
    "bb": (0.1, 1e-3, 0.02),
    "unit": (0.1, 3e-3, 0.5),
    "step-tuned": (0.3, 2e-2, 0.02),
    "pugd": (0.01, 3e-3, 0.5),
}


@pytest.mark.parametrize("target", TARGETS)
@parametrize([row for row in ROWS if row.id in SETTINGS])
def test_convergence(row: Row, target: str) -> None:
    start, minimum, f = TARGETS[target]
    valley = target == "rosenbrock"
    steps = 10_000 if valley else 300
    rate = SETTINGS[row.id][valley]
    decayed = optax.cosine_decay_schedule(rate, steps)
    if row.id == "pugd":
        tx = row.build(learning_rate=decayed, weight_decay=0.0)
    elif row.factory in OPTIMIZERS:
        tx = row.build(learning_rate=rate)
    elif row.id == "bb":
        tx = optax.chain(row.build(learning_rate=rate), optax.sgd(rate))
    elif row.id == "unit":
        tx = optax.chain(row.build(), optax.sgd(decayed))
    else:
        tx = optax.chain(row.build(), optax.sgd(rate, momentum=0.9))
    gradient = jax.grad(f)
    extra = {name: lambda w, step: gradient(w) for name in row.extra}

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = tx.update(gradient(w), state, w, **extra)
        return (optax.apply_updates(w, updates), state), None

    w = jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]
    np.testing.assert_allclose(w, minimum, atol=SETTINGS[row.id][2] if valley else 1e-3)
    assert f(w) < 0.05 * f(start)
