"""What paired differences over seeds show, and what they cannot show.

Student's t gives the interval of each comparison and the p-value that belongs to it.
Holm's correction for all comparisons of a study decides which differences are real. The
exact test of sign flips needs no normal distribution, and is shown beside them. It
decides nothing, since its smallest p-value is 1/16 for five seeds.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from train.intervals import Interval, mean_interval

_ALPHA = 0.05
_POWER = 0.8
# All sign flips of so many pairs are tried, and random ones of more.
_MOST_EXACT = 12
_FLIPS = 9999


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What the paired differences of one comparison show; positive ones are better.

    Attributes:
      interval: mean difference with Student's 95 % interval.
      std: standard deviation of the differences.
      p_value: Student's two-sided p-value, adjusted by Holm for the whole study.
      p_sign_flips: two-sided p-value of the permutation test, not adjusted.
      improved: share of the seeds that are better; ties count half.
      detectable: the true difference that the study finds with 80 % power, if the
        standard deviation is right; 0 if all differences are equal.
      comparisons: number of comparisons in the study.
    """

    interval: Interval
    std: float
    p_value: float
    p_sign_flips: float
    improved: float
    detectable: float
    comparisons: int

    @property
    def helps(self) -> bool:
        """Whether it is better, after Holm's correction."""
        return self.p_value <= _ALPHA and self.interval.low > 0

    @property
    def hurts(self) -> bool:
        """Whether it is worse, after Holm's correction."""
        return self.p_value <= _ALPHA and self.interval.high < 0

    def verdict(self, unit: str = "") -> str:
        """Returns the result in words.

        Args:
          unit: the unit of the differences, with a space before it.
        """
        if self.helps:
            return "helps"
        if self.hurts:
            return "hurts"
        text = "no difference found"
        if not self.interval.low <= 0 <= self.interval.high:
            text += f" (not clear enough among {self.comparisons} comparisons)"
        if self.detectable == 0:
            return f"{text}; all seeds differ by the same"
        return (
            f"{text}; a difference of {self.detectable:.2g}{unit} would have been seen "
            "with 80 % power"
        )


def effects_of(comparisons: Sequence[Sequence[float]]) -> list[Effect]:
    """Returns what each comparison of a study shows.

    >>> (effect,) = effects_of([[0.5, 0.6, 0.4, 0.7]])
    >>> [round(x, 2) for x in effect.interval], effect.verdict()
    ([0.55, 0.34, 0.76], 'helps')

    Args:
      comparisons: for each comparison, the difference of every seed; all have the same
        seeds.

    Raises:
      ValueError: if a comparison has fewer than two seeds.
    """
    if not comparisons:
        return []
    intervals = [mean_interval(differences) for differences in comparisons]
    flips = [sign_flips_p_value(differences) for differences in comparisons]
    stds = np.std(comparisons, axis=1, ddof=1)
    # Student's test has no answer where all differences are equal.
    spread = stds > 1e-9 * np.max(np.abs(comparisons), axis=1)
    p_values = np.array(flips)
    p_values[spread] = stats.ttest_1samp(
        np.asarray(comparisons)[spread], 0.0, axis=1
    ).pvalue
    adjusted = multipletests(p_values, alpha=_ALPHA, method="holm")[1]
    return [
        Effect(
            interval=interval,
            std=float(std),
            p_value=float(p_value),
            p_sign_flips=p_flips,
            improved=float(np.mean(np.sign(differences)) + 1) / 2,
            detectable=detectable_difference(
                float(std) if varies else 0.0, len(differences), len(comparisons)
            ),
            comparisons=len(comparisons),
        )
        for interval, std, varies, p_value, p_flips, differences in zip(
            intervals, stds, spread, adjusted, flips, comparisons, strict=True
        )
    ]


def sign_flips_p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of the mean if the sign of each is a coin flip.

    It is exact for up to 12 differences. For more, 9,999 random flips are tried.

    >>> sign_flips_p_value([1.0, 2.0, 3.0])
    0.25
    """
    exact = len(differences) <= _MOST_EXACT
    result = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if exact else _FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def detectable_difference(std: float, num_seeds: int, comparisons: int = 1) -> float:
    """Returns the true difference that a study finds with 80 % power.

    Holm's correction may ask the smallest p-value to be below 5 % over the number of
    comparisons, so this is the level. The power at any later step is higher.

    >>> round(detectable_difference(1.0, 10), 2)
    1.0

    Args:
      std: standard deviation of the paired differences.
      num_seeds: number of pairs.
      comparisons: number of comparisons in the study.
    """
    return _detectable_size(num_seeds, comparisons) * std


@functools.cache
def _detectable_size(num_seeds: int, comparisons: int) -> float:
    """Returns the detectable difference in standard deviations.

    Its sign matters, so the test is one-sided at half the level. The solver of
    statsmodels itself gives wrong sizes for few seeds.
    """
    level = _ALPHA / comparisons / 2
    test = TTestPower()

    def power(size: float) -> float:
        return float(test.power(size, num_seeds, level, alternative="larger"))

    largest = 1.0
    while power(largest) < _POWER:
        largest *= 2
    return float(optimize.brentq(lambda size: power(size) - _POWER, 0.0, largest))
