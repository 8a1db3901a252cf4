"""The scalars of optimizer states by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_tricks
from optax_tricks import logged_scalars
from tests.optax_tricks.table import PARAMS, STATES, Row, every_row, grad_fn, run

RANDOM = ["random_factor"]
BB = [
    "bb_count",
    "bb_step_size",
    "bb_curvature",
    "bb_gradient_norm",
    "bb_half_gradient_norm",
    "bb_nonpositive_curvature_count",
    "bb_min_scale_count",
    "bb_max_scale_count",
]
PUGD = [
    "pugd_perturbation_norm",
    "pugd_gradient_norm",
    "pugd_perturbed_gradient_norm",
    "pugd_zero_count",
]
FINITE = ["notfinite_count", "last_finite", "total_notfinite"]


def random(key: int = 0) -> Any:
    return optax_tricks.scale_by_random(key)


def bb() -> Any:
    return optax_tricks.barzilai_borwein_step(0.1)


WAVE = optax.cosine_decay_schedule(0.1, 5)
LABELS = {"conv": {"kernel": "a", "bias": "b"}, "list": ["a"], "number": "b"}
# A transform and the names of the scalars in its state.
STATES_AND_NAMES: dict[str, tuple[Any, list[str]]] = {
    "nothing": (optax.sgd(0.1), []),
    "centralize": (optax_tricks.centralize(), []),
    "one": (random(), RANDOM),
    "chain": (optax.chain(random(), bb(), optax.trace(0.9)), RANDOM + BB),
    "twice": (
        optax.chain(random(), optax_tricks.centralize(), random(1), bb()),
        ["0/random_factor", "2/random_factor", *BB],
    ),
    "nested": (
        optax.chain(optax.chain(random(), optax.chain(random(1)))),
        ["0/0/random_factor", "0/1/0/random_factor"],
    ),
    "named": (
        optax.named_chain(("first", random()), ("second", random(1))),
        ["first/random_factor", "second/random_factor"],
    ),
    "partition": (
        optax.partition({"a": random(), "b": random(1)}, LABELS),
        [f"inner_states/{k}/inner_state/random_factor" for k in "ab"],
    ),
    "masked": (optax.masked(random(), lambda p: jax.tree.map(jnp.ndim, p)), RANDOM),
    "adam": (optax.chain(random(), optax.adam(0.1)), [*RANDOM, "count"]),
    "two counts": (
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(WAVE)),
        ["0/count", "1/count"],
    ),
    "guarded": (optax.apply_if_finite(bb(), 5), FINITE + BB),
    "accumulated": (
        optax.MultiSteps(random(), 2),
        ["mini_step", "gradient_step", *RANDOM],
    ),
    "injected": (
        optax.inject_hyperparams(optax_tricks.pugd)(0.1),
        ["count", "learning_rate", "momentum", "weight_decay", *PUGD],
    ),
    "alias": (optax_tricks.step_tuned_sgd(0.1), [*BB, "count"]),
}


@pytest.mark.parametrize(
    ("tx", "names"), STATES_AND_NAMES.values(), ids=STATES_AND_NAMES
)
def test_names(tx: Any, names: list[str]) -> None:
    # A parameter of shape () has traces and moments of shape ().
    state = tx.init({**PARAMS, "number": jnp.float32(1)})
    scalars = logged_scalars(state)
    assert list(scalars) == names
    assert all(np.isfinite(float(value)) for value in scalars.values())
    traced = jax.jit(logged_scalars)(state)
    assert {k: float(v) for k, v in traced.items()} == {
        k: float(v) for k, v in scalars.items()
    }


@every_row
def test_every_documented_scalar_is_there_with_its_value(row: Row) -> None:
    _, state = run(row.build(), row.extra)
    scalars = logged_scalars(state)
    ours = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, STATES))
        if isinstance(x, STATES)
    ]
    for field, value in (item for node in ours for item in node._asdict().items()):
        is_scalar = field not in ("random_key", "bb_difference")
        assert (field in scalars) == is_scalar
        if is_scalar:
            assert float(scalars[field]) == float(value)


def test_the_state_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(random(), bb()), wrt=nnx.Param)
    state = nnx.state(model, nnx.Param)
    optimizer.update(model, state, grad_fn=lambda params, step: grad_fn(params, step))
    scalars = logged_scalars(optimizer.opt_state)
    assert list(scalars) == RANDOM + BB
    assert scalars["bb_count"] == 1
    assert logged_scalars(optimizer) == scalars


def test_a_flax_train_state_stands_for_its_state() -> None:
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=random())
    assert list(logged_scalars(state)) == RANDOM


def test_a_state_of_optax_that_holds_another_is_read_in_full() -> None:
    tx = optax.contrib.sam(optax.chain(random()), optax.sgd(0.1))
    scalars = logged_scalars(tx.init(PARAMS))
    assert list(scalars) == ["steps_since_sync", *RANDOM]


@pytest.mark.parametrize("state", [(), None, {}, optax.EmptyState(), [()]])
def test_states_without_scalars(state: Any) -> None:
    assert logged_scalars(state) == {}
