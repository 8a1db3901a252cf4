"""The order of a chain: what is kept, what is filled in, and what is refused."""

import itertools

import pytest

from tests.train.optim.chains import config
from train.errors import UsageError
from train.optim.chain import PLACES, chain_order, check_order, regularizes_both
from train.optim.techniques import TECHNIQUES


@pytest.mark.parametrize(
    ("techniques", "optimizer", "expected"),
    [
        # As in the papers, if no place is named.
        ("", "sgd", "decay optimizer"),
        ("scale_by_random", "sgd", "scale_by_random decay optimizer"),
        (
            "scale_by_random centralize",
            "sgd",
            "scale_by_random decay centralize optimizer",
        ),
        ("perturbed_unit_step", "sgd", "perturbed_unit_step decay optimizer"),
        ("barzilai_borwein_step", "sgd", "barzilai_borwein_step optimizer"),
        ("centralize", "adamw", "centralize optimizer decay"),
        ("barzilai_borwein_step", "sgdw", "barzilai_borwein_step optimizer decay"),
        # The given order is kept.
        (
            "centralize scale_by_random",
            "sgd",
            "decay centralize scale_by_random optimizer",
        ),
        (
            "scale_by_random decay centralize",
            "sgd",
            "scale_by_random decay centralize optimizer",
        ),
        ("centralize decay", "sgd", "centralize decay optimizer"),
        ("barzilai_borwein_step decay", "sgd", "barzilai_borwein_step decay optimizer"),
        ("optimizer centralize", "adam", "decay optimizer centralize"),
        (
            "scale_by_random optimizer centralize",
            "adam",
            "scale_by_random decay optimizer centralize",
        ),
        ("optimizer centralize", "adamw", "optimizer centralize decay"),
        ("optimizer decay centralize", "adamw", "optimizer decay centralize"),
    ],
)
def test_order_of_the_chain(techniques, optimizer, expected):
    chosen = config(*techniques.split(), optimizer=optimizer)
    assert chosen.chain == tuple(expected.split())
    decoupled = optimizer in ("adamw", "sgdw")
    order = chain_order(techniques.split(), decoupled=decoupled, clip=False)
    assert order == tuple(expected.split())


@pytest.mark.parametrize(
    ("techniques", "expected"),
    [
        ("", "clip decay optimizer"),
        ("scale_by_random", "clip scale_by_random decay optimizer"),
        ("sam scale_by_random", "sam clip scale_by_random decay optimizer"),
        ("perturbed_unit_step", "perturbed_unit_step clip decay optimizer"),
        ("barzilai_borwein_step", "barzilai_borwein_step clip optimizer"),
        ("optimizer centralize", "clip decay optimizer centralize"),
    ],
)
def test_the_gradient_is_clipped_first_or_after_what_replaces_it(techniques, expected):
    chosen = config(*techniques.split(), clip_norm=1.0)
    assert chosen.chain == tuple(expected.split())


def valid_lists():
    """Yields all lists of up to three techniques and places that are allowed."""
    for length in range(4):
        for names in itertools.permutations((*TECHNIQUES, *PLACES), length):
            try:
                check_order(names)
            except UsageError:
                continue
            yield names


@pytest.mark.parametrize("decoupled", [False, True])
def test_every_chain_keeps_the_given_order_and_has_each_part_once(decoupled):
    count = 0
    for names in valid_lists():
        try:
            order = chain_order(names, decoupled=decoupled, clip=True)
        except UsageError:
            assert "decay" in names
            continue
        count += 1
        assert [name for name in order if name in names] == list(names)
        assert len(set(order)) == len(order)
        # What takes a second gradient comes first: it would replace all before it.
        assert not any(
            name in TECHNIQUES and TECHNIQUES[name].gradients_per_step == 2
            for name in order[1:]
        )
        assert {"optimizer", "clip"} <= set(order)
        if "decay" in order:
            is_behind = order.index("decay") > order.index("optimizer")
            assert is_behind == decoupled
        else:
            assert any(regularizes_both(name) for name in names)
            assert not decoupled
    assert count > 50


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("scale_by_random,scale_by_random", "a technique is named twice: scale_by_r"),
        (
            "barzilai_borwein_step,perturbed_unit_step",
            "barzilai_borwein_step and perturbed_unit_step both replace the gradient: "
            "take one of them",
        ),
        ("sam,perturbed_unit_step", "sam and perturbed_unit_step both replace"),
        (
            "scale_by_random,perturbed_unit_step,centralize",
            "the names before it in scale_by_random,perturbed_unit_step,centralize "
            "would do nothing: put it first, "
            "perturbed_unit_step,scale_by_random,centralize; see docs/training.md#",
        ),
        ("optimizer,sam", "put it first, sam,optimizer; see "),
        ("decay,sam", "put it first, sam,decay; see "),
    ],
)
def test_orders_that_make_no_sense_are_refused(names, message):
    with pytest.raises(UsageError, match=message):
        check_order(names.split(","))


@pytest.mark.parametrize(
    ("names", "decoupled", "message"),
    [
        (
            "optimizer,decay",
            False,
            "decay is on the wrong side of the optimizer in optimizer,decay: name it "
            "before `optimizer`, or take an optimizer with decoupled decay",
        ),
        (
            "decay,centralize",
            True,
            "in decay,centralize,optimizer: name it after `optimizer`, or take an "
            "optimizer with L2 decay",
        ),
    ],
)
def test_decay_of_the_other_kind_is_refused(names, decoupled, message):
    with pytest.raises(UsageError, match=message):
        chain_order(names.split(","), decoupled=decoupled, clip=False)


def test_only_step_tuned_sgd_regularizes_both_gradients():
    assert [name for name in (*TECHNIQUES, *PLACES) if regularizes_both(name)] == [
        "barzilai_borwein_step"
    ]
