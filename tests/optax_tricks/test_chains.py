"""The transforms in chains, with transforms of optax and with each other."""

import itertools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import optax
import pytest

from tests.optax_tricks.table import (
    LR,
    PARAMS,
    STATES,
    TRANSFORMS,
    TWO,
    Row,
    loss,
    parametrize,
    plain,
    run,
    types,
)


def descend(tx: Any, extra: Mapping[str, Any], steps: int) -> Any:
    """Returns params and state after some steps, which must reduce the loss."""
    params, state = run(tx, extra, steps=steps)
    chex.assert_tree_all_finite((params, plain(state)))
    assert loss(params) < loss(PARAMS) - 0.1
    return params, state


def assert_readable(state: Any, row: Row, chain: str) -> None:
    """Checks that `optax.tree.get` finds every field of the row in a chain."""
    nodes = jax.tree.leaves(
        row.build().init(PARAMS), is_leaf=lambda x: isinstance(x, STATES)
    )
    for node in nodes:
        if isinstance(node, STATES):
            for field, value in node._asdict().items():
                where = f"{field} of {row.id} in the chain {chain}"
                found = optax.tree.get_all_with_path(state, field)
                assert len(found) == 1, f"{where} is there {len(found)} times"
                got = types(optax.tree.get(state, field))
                assert got == types(value), f"{where} is {got}"


OTHERS = {
    "clipping": optax.clip_by_global_norm(1.0),
    "decay": optax.add_decayed_weights(0.01),
    "momentum": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "schedule": optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 50)),
}


@pytest.mark.parametrize("place", ["front", "back"])
@parametrize(TRANSFORMS)
def test_chains_with_transforms_of_optax(row: Row, place: str) -> None:
    for name, other in OTHERS.items():
        pair = [row.build(), other] if place == "front" else [other, row.build()]
        tx = optax.chain(*pair, optax.scale_by_learning_rate(LR))
        _, state = descend(tx, row.extra, steps=5)
        assert_readable(state, row, f"with {name} ({place})")
    every = [row.build(), *OTHERS.values()]
    if place == "back":
        every = every[1:] + every[:1]
    tx = optax.chain(*every, optax.scale_by_learning_rate(LR))
    _, state = descend(tx, row.extra, steps=5)
    assert_readable(state, row, f"with all others ({place})")


@pytest.mark.parametrize(
    "pair",
    list(itertools.permutations(TRANSFORMS, 2)),
    ids=lambda pair: "-".join(row.id for row in pair),
)
def test_two_transforms_in_one_chain(pair: tuple[Row, Row]) -> None:
    tx = optax.chain(*(row.build() for row in pair), optax.sgd(LR))
    _, state = descend(tx, TWO, steps=5)
    for row in pair:
        assert_readable(state, row, "-".join(row.id for row in pair))


@pytest.mark.parametrize("order", [TRANSFORMS, TRANSFORMS[::-1]], ids=["forth", "back"])
def test_all_transforms_in_one_chain(order: list[Row]) -> None:
    tx = optax.chain(*(row.build() for row in order), optax.sgd(LR))
    _, state = descend(tx, TWO, steps=5)
    for row in order:
        assert_readable(state, row, "-".join(row.id for row in order))
