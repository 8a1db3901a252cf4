import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks
from train.optimizers import (
    TRICKS,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    trick_scalars,
)

KEY = jax.random.key(0)
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([1.0, 2.0])}


def loss(params):
    return jnp.sum(jnp.sin(params["kernel"])) + jnp.sum(params["bias"] ** 3)


def grad_fn(params, step):
    return jax.grad(loss)(params)


def run(tx, steps, grad_fn=grad_fn):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params, state


def config(*tricks, **changes):
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant"}
    return OptimizerConfig(tricks=tricks, **settings | changes)


def test_without_tricks_it_is_sgd_with_momentum_and_l2():
    params, _ = run(make_optimizer(config(), 100, KEY), 4)
    sgd = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
    expected, _ = run(optax.with_extra_args_support(sgd), 4)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_centralize_projects_the_decay_too():
    tx = make_optimizer(config("centralize", momentum=0.0), 100, KEY)
    params, _ = run(tx, 3)
    before, after = PARAMS["kernel"].mean(0), params["kernel"].mean(0)
    chex.assert_trees_all_close(after, before, atol=1e-6)


def test_random_leaves_the_decay_alone():
    tx = make_optimizer(config("random", momentum=0.0), 100, KEY)
    updates, state = tx.update(grad_fn(PARAMS, 0), tx.init(PARAMS), PARAMS)
    factor = optax.tree.get(state, "random_factor")
    expected = jax.tree.map(
        lambda g, w: -0.01 * (factor * g + 0.1 * w), grad_fn(PARAMS, 0), PARAMS
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_perturbed_unit_is_pugd():
    params, _ = run(make_optimizer(config("perturbed_unit"), 100, KEY), 4)
    expected, _ = run(optax_tricks.pugd(0.01, weight_decay=0.1), 4)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_barzilai_borwein_is_step_tuned_sgd_on_the_regularised_loss():
    settings = {"momentum": 0.0, "schedule": "robbins_monro"}
    params, _ = run(make_optimizer(config("barzilai_borwein", **settings), 100, KEY), 4)

    def regularised(params, step):
        return jax.grad(lambda p: loss(p) + 0.05 * optax.tree.norm(p, squared=True))(
            params
        )

    expected, _ = run(optax_tricks.step_tuned_sgd(0.01), 4, regularised)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("tricks", "expected"),
    [
        ((), 1),
        (("random", "centralize"), 1),
        (("barzilai_borwein",), 2),
        (("random", "perturbed_unit", "centralize"), 2),
    ],
)
def test_gradients_per_step_are_those_taken(tricks, expected):
    tx, calls = make_optimizer(config(*tricks), 100, KEY), []

    def counted(params, step):
        calls.append(step)
        return grad_fn(params, step)

    tx.update(grad_fn(PARAMS, 0), tx.init(PARAMS), PARAMS, grad_fn=counted)
    assert 1 + len(calls) == config(*tricks).gradients_per_step == expected


@pytest.mark.parametrize(
    ("schedule", "at_start", "at_half"),
    [
        ("constant", 0.2, 0.2),
        ("cosine", 0.2, 0.1),
        ("poly", 0.2, 0.2 * 0.5**0.9),
        ("robbins_monro", 0.2, 0.2 * 51**-0.501),
    ],
)
def test_schedules(schedule, at_start, at_half):
    rate = make_schedule(OptimizerConfig(learning_rate=0.2, schedule=schedule), 100)
    np.testing.assert_allclose([rate(0), rate(50)], [at_start, at_half], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tricks": ("rndom",)}, "unknown trick 'rndom'; known: random"),
        ({"tricks": ("random", "random")}, "named twice: random,random"),
        ({"tricks": ("barzilai_borwein", "perturbed_unit")}, "take one"),
        ({"learning_rate": 0.0}, "above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "above 0, got nan"),
        ({"momentum": 1.0}, r"\[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, ">= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


@pytest.mark.parametrize("trick", TRICKS)
def test_scalars_to_log(trick):
    tx = make_optimizer(config(trick), 100, KEY)
    _, state = run(tx, 2)
    scalars = trick_scalars(state)
    names = {
        "random": {"random_factor"},
        "centralize": set(),
        "barzilai_borwein": {"bb_step_size", "bb_curvature", "bb_gradient_norm"},
        "perturbed_unit": {"pugd_gradient_norm", "pugd_perturbation_norm"},
    }
    assert names[trick] <= scalars.keys()
    assert bool(names[trick]) == bool(scalars)
    assert all(value.shape == () for value in scalars.values())
