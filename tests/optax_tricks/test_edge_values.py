"""Zero, non-finite and complex gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optax_tricks.table import (
    DOUBLE,
    GRADS,
    LR,
    PARAMS,
    SINGLE,
    Row,
    assert_close,
    assert_equal,
    every_row,
    make_params,
    parametrize,
    plain,
    types,
)


@every_row
def test_zero_gradients_give_zero_updates(row: Row) -> None:
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    extra = {name: lambda params, step: zeros for name in row.extra}
    tx = row.build()
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(zeros, state, zeros, **extra)
        assert_equal(updates, zeros)
    chex.assert_tree_all_finite(plain(state))
    # With weights, only their decay remains.
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, **extra)
    decay = row.kwargs.get("weight_decay", 0)
    assert_close(updates, jax.tree.map(lambda w: -LR * decay * w, PARAMS))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_row
def test_non_finite_gradients_stay_visible(row: Row, bad: float) -> None:
    tx = row.build()
    spoilt = {**GRADS, "list": [GRADS["list"][0].at[2, 1].set(bad)]}
    updates, _ = tx.update(spoilt, tx.init(PARAMS), PARAMS, **row.extra)
    assert not jnp.isfinite(updates["list"][0][2, 1])
    if row.extra:  # also in the second gradient alone
        updates, _ = tx.update(
            GRADS, tx.init(PARAMS), PARAMS, grad_fn=lambda params, step: spoilt
        )
        assert not jnp.isfinite(updates["list"][0][2, 1])


COMPLEX = jax.tree.map(lambda x, y: x + 1j * y, PARAMS, make_params(1))


@parametrize(SINGLE)
def test_complex_leaves_are_right(row: Row) -> None:
    tx = row.build()
    parts = [jax.tree.map(part, COMPLEX) for part in (jnp.real, jnp.imag)]
    real, imag = (tx.update(part, tx.init(part))[0] for part in parts)
    got, _ = tx.update(COMPLEX, tx.init(COMPLEX), COMPLEX)
    assert types(got) == types(COMPLEX)
    assert_close(got, jax.tree.map(lambda x, y: x + 1j * y, real, imag))


@parametrize(DOUBLE)
def test_complex_leaves_are_refused(row: Row) -> None:
    tx = row.build()
    message = "real parameters, but got a leaf of dtype complex64"
    with pytest.raises(ValueError, match=message):
        tx.init(COMPLEX)
    with pytest.raises(ValueError, match=message):
        tx.update(COMPLEX, tx.init(PARAMS), COMPLEX, **row.extra)
