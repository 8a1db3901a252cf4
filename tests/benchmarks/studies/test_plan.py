"""How many epochs and seeds fit into a time."""

import pytest

from benchmarks.studies.plan import Cost, choose, in_words, parse_duration
from train.errors import UsageError

# A run of one epoch takes 10 s, and of three 30 s.
TEN = Cost(start=0.0, step=1.0, evaluation=0.0, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), (" 2 m ", 120)],
)
def test_durations_have_units(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "-3m", "3d", "0s", "1m30s", "", "nan s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="budget must be a time above 0 with a unit"):
        parse_duration(text)


def test_words_keep_two_digits():
    found = [in_words(s) for s in (0.4, 59, 61, 599, 601, 7199, 7200)]
    assert found == ["0 s", "59 s", "1.0 min", "10.0 min", "10 min", "120 min", "2.0 h"]


def test_a_cost_counts_start_steps_and_evaluations():
    cost = Cost(start=1.0, step=0.5, evaluation=2.0, steps_per_epoch=4, epochs_factor=2)
    assert cost.seconds(3) == 1 + 6 * (2 + 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1e9, (3, 20)),  # not more than are wanted
        (300, (3, 10)),  # seeds before epochs
        (90, (3, 3)),
        (89, (2, 4)),  # three seeds, or more where they fit
        (60, (2, 3)),
        (30, (1, 3)),
        (29, (1, 2)),  # two seeds at last
        (20, (1, 2)),
    ],
)
def test_seeds_go_before_epochs(seconds, expected):
    found = choose([TEN], budget=seconds + 7, spent=7, most_epochs=3, most_seeds=20)
    assert found == (*expected, 1.0)
    halves = [Cost(start=0.0, step=0.5, evaluation=0.0, steps_per_epoch=10)] * 2
    assert choose(halves, budget=seconds, spent=0, most_epochs=3, most_seeds=20) == (
        *expected,
        1.0,
    )


def test_two_seeds_that_are_asked_for_keep_their_epochs():
    assert choose([TEN], budget=60, spent=0, most_epochs=3, most_seeds=2)[:2] == (3, 2)


def test_too_small_a_budget_says_what_it_takes():
    two = [TEN, Cost(start=10.0, step=1.0, evaluation=10.0, steps_per_epoch=10)]
    said = (
        r"a budget of 59 s is too small: one epoch and 2 seeds of 2 methods take about "
        r"1\.3 min to train, and 40 s to load, compile and draw; give it more time"
    )
    for budget in (59, 119):
        with pytest.raises(UsageError, match=said.replace("59 s", in_words(budget))):
            choose(two, budget=budget, spent=40, most_epochs=3, most_seeds=20)
    assert choose(two, budget=120, spent=40, most_epochs=3, most_seeds=20)[:2] == (1, 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (80, (1, 2, 1.0)),
        (79, (1, 3, 0.5)),  # three seeds again
        (40, (1, 2, 0.5)),
        (39, (1, 3, 0.25)),
        (20, (1, 2, 0.25)),  # ten steps in an epoch
    ],
)
def test_examples_are_halved_after_epochs(seconds, expected):
    cost = Cost(start=0.0, step=1.0, evaluation=0.0, steps_per_epoch=40)
    sizes = {"most_epochs": 3, "most_seeds": 20}
    assert choose([cost], budget=seconds, spent=0, **sizes) == expected
    with pytest.raises(UsageError, match="2 seeds of 1 methods take about 20 s"):
        choose([cost], budget=19, spent=0, **sizes)
