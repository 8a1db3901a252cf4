"""The statistics of a study, on differences whose true effects are known."""

import itertools
import statistics

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies.statistics import (
    detectable_difference,
    effects_of,
    sign_flips_p_value,
)

SEEDS = 5
STATISTICS = "benchmarks.studies.statistics"


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes most of the time of a simulation, and decides nothing."""
    monkeypatch.setattr(f"{STATISTICS}.sign_flips_p_value", lambda differences: 1.0)
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it every time


def most_of(trials, probability):
    """The largest share that is plausible: one in 10,000 would be larger."""
    return stats.binom.ppf(1 - 1e-4, trials, probability) / trials


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("effect", [0.0, 0.7])
def test_95_of_100_intervals_hold_the_effect(effect):
    rng = np.random.default_rng(1)
    found = effects_of(rng.normal(effect, 2.0, size=(2000, SEEDS)).tolist())
    missed = [not e.interval.low <= effect <= e.interval.high for e in found]
    assert 1 - most_of(2000, 0.95) <= statistics.mean(missed) <= most_of(2000, 0.05)


@pytest.mark.usefixtures("quick")
def test_one_study_in_twenty_without_effects_finds_one():
    """Seven methods of equal quality; six are compared with the same first one."""
    rng = np.random.default_rng(2)
    alarms = []
    for scores in rng.normal(90.0, 1.0, size=(1000, 7, SEEDS)):
        found = effects_of((scores[1:] - scores[0]).tolist())
        alarms.append(any(e.helps or e.hurts for e in found))
    assert 0.01 < statistics.mean(alarms) <= most_of(1000, 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("num_seeds", "comparisons"), [(2, 1), (5, 1), (3, 6), (8, 6)])
def test_the_detectable_difference_is_found_in_four_of_five_studies(
    num_seeds, comparisons
):
    """One technique has this effect, and the others of the study have none."""
    rng = np.random.default_rng(3)
    differences = rng.normal(0.0, 2.0, size=(1000, comparisons, num_seeds))
    differences[:, 0] += detectable_difference(2.0, num_seeds, comparisons)
    found = statistics.mean(effects_of(d)[0].helps for d in differences.tolist())
    # Holm may find more, where another one is found by chance.
    assert 1 - most_of(1000, 0.2) <= found <= most_of(1000, 0.82)


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 20, 100])
def test_more_comparisons_need_larger_differences(num_seeds):
    sizes = [detectable_difference(1.0, num_seeds, n) for n in (1, 2, 6, 12, 50)]
    assert sizes == sorted(sizes)
    assert all(0 < size < 1000 for size in sizes)


def enumerated(differences):
    """The share of all sign flips whose sum is as far from zero, in plain Python."""
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(f, differences, strict=True))) for f in flips]
    return sum(s >= sums[0] - 1e-9 for s in sums) / len(flips)


@pytest.mark.parametrize("num_seeds", [2, 5, 8, 12])
def test_sign_flips_are_those_of_an_enumeration(num_seeds):
    rng = np.random.default_rng(num_seeds)
    for shift in (0.0, 0.5, -3.0):
        differences = (np.round(rng.normal(size=num_seeds), 1) + shift).tolist()
        expected = enumerated(differences)
        assert sign_flips_p_value(differences) == pytest.approx(expected)


def test_random_sign_flips_of_many_seeds_repeat():
    differences = np.random.default_rng(0).normal(0.8, 1.0, size=16).tolist()
    p_value = sign_flips_p_value(differences)
    assert p_value == sign_flips_p_value(differences)
    assert p_value == pytest.approx(enumerated(differences), abs=0.01)


def test_holm_is_by_hand():
    rng = np.random.default_rng(4)
    comparisons = rng.normal(0.8, 1.0, size=(4, 6)).tolist()
    raw = [stats.ttest_1samp(differences, 0).pvalue for differences in comparisons]
    order = np.argsort(raw)
    expected, largest = np.empty(4), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (4 - rank) * raw[i]))
        expected[i] = largest
    found = [effect.p_value for effect in effects_of(comparisons)]
    np.testing.assert_allclose(found, expected)


def test_the_verdict_follows_from_interval_and_correction():
    better = [0.5, 0.6, 0.4, 0.7]
    unclear = [0.1, 0.3, 0.5, 0.6]  # its interval excludes zero, by little
    helps, hurts = effects_of([better, [-x for x in better]])
    assert (helps.helps, helps.hurts, helps.verdict()) == (True, False, "helps")
    assert (hurts.helps, hurts.hurts, hurts.verdict()) == (False, True, "hurts")
    (alone,) = effects_of([unclear])
    assert alone.interval.low > 0
    assert alone.verdict() == "helps"
    among_six = effects_of([unclear] + [[1.0, -1.0, 0.5, -0.6]] * 5)[0]
    assert among_six.interval == alone.interval
    assert among_six.detectable > alone.detectable
    assert among_six.verdict(" points") == (
        "no difference found (not clear enough among 6 comparisons); a difference of "
        f"{among_six.detectable:.2g} points would have been seen with 80 % power"
    )
    (none,) = effects_of([[1.0, -1.0, 0.5, -0.6]])
    assert none.verdict().startswith("no difference found; a difference of ")


def test_equal_differences_prove_nothing_of_few_seeds():
    """Without a spread Student's p-value is 0, whatever the number of seeds."""
    (two,) = effects_of([[98.1 - 97.9, 97.1 - 96.9]])
    assert not two.helps
    assert two.p_value == 0.5
    (ten,) = effects_of([[0.2] * 10])
    assert ten.helps
    assert ten.detectable == pytest.approx(0, abs=1e-9)
    (same,) = effects_of([[0.0, 0.0, 0.0]])
    assert (same.p_value, same.p_sign_flips, same.improved) == (1.0, 1.0, 0.5)
    assert same.verdict().startswith("no difference found; ")


def test_ties_count_half():
    (effect,) = effects_of([[1.0, 0.0, -2.0, 3.0]])
    assert effect.improved == 0.625


def test_one_seed_is_refused():
    assert effects_of([]) == []
    with pytest.raises(ValueError, match="two or more values"):
        effects_of([[1.0]])
