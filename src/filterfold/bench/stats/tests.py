"""Tests of two and of several samples, and Holm's correction."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import ConfigError
from .results import EFFECTS, Difference, Effect, Equivalence, Pairwise, Significance, Summary

Samples = Mapping[str, ArrayLike]
"""Group name → one value for each trial, in the order in which the groups are to be shown."""

Array = NDArray[np.float64]

ENOUGH = 5
"""Trials a group from which the χ² approximation of Kruskal–Wallis is usable (SciPy's documentation)."""


def check_sample(values: ArrayLike, name: str = "a sample") -> Array:
    """Values as float64 of shape `(n,)`, n ≥ 1, all finite; refused by `name` otherwise."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ConfigError(f"{name} has shape {x.shape}; give one value or more, in one dimension")
    if not np.isfinite(x).all():
        raise ConfigError(f"{name} holds {x[~np.isfinite(x)][0]}; leave out trials without a result")
    return x


def check_groups(groups: Samples, least: int) -> dict[str, Array]:
    """Every group checked, in the order given; refused if there are fewer than `least`."""
    if len(groups) < least:
        raise ConfigError(f"{len(groups)} groups given; a comparison needs at least {least}")
    return {name: check_sample(values, f"group {name!r}") for name, values in groups.items()}


def check_pair(sample: ArrayLike, control: ArrayLike, paired: bool) -> tuple[Array, Array]:
    """Sample and control checked; refused if `paired` and of unequal length."""
    x, y = check_sample(sample, "the sample"), check_sample(control, "the control")
    if paired and len(x) != len(y):
        raise ConfigError(f"{len(x)} values against {len(y)} can't be paired; give one control for each")
    return x, y


def no_spread(x: Array, y: Array, paired: bool) -> str | None:
    """Why no t-test is possible, or None."""
    if min(len(x), len(y)) < 2:
        return "one trial has no spread: an interval needs at least two trials a side"
    # Values that are equal on paper differ in their last bits once they have been subtracted.
    scale = 1e-12 * max(float(np.abs(np.concatenate([x, y])).max()), 1e-300)
    if paired and float(np.ptp(x - y)) <= scale:
        return "all differences are equal: there is no spread to test against"
    if not paired and max(float(np.ptp(x)), float(np.ptp(y))) <= scale:
        return "both groups are without spread: there is nothing to test against"
    return None


def small_groups(samples: Mapping[str, Array]) -> tuple[str, ...]:
    """A note that names the groups under `ENOUGH` trials, if there are any."""
    small = [f"{name} ({len(x)})" for name, x in samples.items() if len(x) < ENOUGH]
    if not small:
        return ()
    return (f"groups under {ENOUGH} trials, so the p-value is rough: {', '.join(small)}",)


RESAMPLES = 50_000
"""A permutation test tries every regrouping up to this many; beyond, it draws so many with a fixed seed."""


def permutation(sample: ArrayLike, control: ArrayLike, *, paired: bool = False, seed: int = 0) -> Significance:
    """Two-sided permutation test of the difference in means (`scipy.stats.permutation_test`): no assumed distribution.

    Every regrouping of the values (paired: every exchange within pairs) is tried where there are at most `RESAMPLES`.
    The p-value is the share of regroupings whose absolute difference is at least as large as the one found (Phipson
    and Smyth 2010 for random draws).

    >>> permutation([1, 2, 3], [4, 5, 6]).p
    0.1
    """
    from scipy import stats

    x, y = check_pair(sample, control, paired)
    n, together = (len(x), len(y)), np.concatenate([x, y])
    shift, scale = y.mean(), max(float(np.ptp(together)), 1e-300)
    ways = 2 ** len(x) if paired else math.comb(sum(n), n[0])
    if min(n) == 1:  # SciPy refuses these: any of the values could have been the single one, or either of the pair
        distances = np.round(np.abs(together - together.mean()) / scale, 9)
        p = float((distances >= distances[0 if n[0] == 1 else -1]).mean())
    else:
        kind: Literal["samples", "independent"] = "samples" if paired else "independent"
        options: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": 10_000, "random_state": seed, "vectorized": True}
        both = ((x - shift) / scale, (y - shift) / scale)
        p = float(
            stats.permutation_test(both, _distance, permutation_type=kind, alternative="greater", **options).pvalue
        )
    notes = []
    # With equal sizes, exchanging the sides gives the same absolute difference once more.
    if (least := (2 if n[0] == n[1] else 1) / ways) > 0.05:
        trials = f"{n[0]} pairs" if paired else f"{n[0]} against {n[1]} trials"
        notes.append(f"with {trials} no p-value under {least:.3g} is possible")
    if ways > RESAMPLES:
        notes.append(f"estimated from {RESAMPLES} random regroupings")
    return Significance(float(x.mean() - y.mean()), p, n, ways <= RESAMPLES, tuple(notes))


def _distance(x: Array, y: Array, axis: int) -> Array:
    """Absolute difference in means; rounded, because equal ones that come from other sums differ in their last bits."""
    found: Array = np.round(np.abs(x.mean(axis=axis) - y.mean(axis=axis)), 9)
    return found


def summarise(values: ArrayLike) -> Summary:
    """Mean, spread and extremes of one group.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(n=3, mean=2.0, sd=1.0, median=2.0, low=1.0, high=3.0)
    >>> summarise([7.0]).sd is None
    True
    """
    x = check_sample(values)
    sd = float(x.std(ddof=1)) if len(x) > 1 else None
    return Summary(len(x), float(x.mean()), sd, float(np.median(x)), float(x.min()), float(x.max()))


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for the mean of one group; None for a single value.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.special import stdtrit

    x = check_sample(values)
    if len(x) < 2:
        return None
    half = float(stdtrit(len(x) - 1, (1 + confidence) / 2)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def mean_difference(
    sample: ArrayLike, control: ArrayLike, *, confidence: float = 0.95, paired: bool = False
) -> Difference:
    """Mean of `sample` minus mean of `control`, with Welch's interval and p-value.

    **Arguments:**

    - `sample`, `control`: values of shape `(n,)` and `(m,)`.
    - `confidence`: two-sided coverage of the interval.
    - `paired`: entry i of both belongs together (trials from one checkpoint); needs n = m.

    >>> d = mean_difference([1, 2, 3, 4], [3, 4, 5, 6])
    >>> d.value, round(d.low, 3), round(d.high, 3)
    (-2.0, -4.234, 0.234)
    """
    x, y = check_pair(sample, control, paired)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; it must lie between 0 and 1, for instance 0.95")
    value, n = float(x.mean() - y.mean()), (len(x), len(y))
    reason = no_spread(x, y, paired)
    if reason:
        return Difference(value, None, None, None, n, (reason,))
    test = _t_test(x, y, paired, "two-sided")
    interval = test.confidence_interval(confidence)
    return Difference(value, float(interval.low), float(interval.high), float(test.pvalue), n)


def proportion_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of n independent cases (Wilson 1927), such as images that were told right.

    >>> low, high = proportion_interval(0.9, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    from scipy import stats

    found = stats.binomtest(round(share * n), n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def mean_ratio(sample: ArrayLike, control: ArrayLike, *, confidence: float = 0.95, paired: bool = False) -> Difference:
    """Geometric mean of `sample` over that of `control`, with interval and p-value; for times.

    The t-test of `mean_difference` on logarithms; a value of .5 means half as long.

    >>> mean_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]).value
    0.5
    """
    x, y = check_pair(sample, control, paired)
    if min(x.min(), y.min()) <= 0:
        raise ConfigError(f"a ratio needs values above 0, but one is {min(x.min(), y.min()):g}")
    log = mean_difference(np.log(x), np.log(y), confidence=confidence, paired=paired)
    low, high = (None if bound is None else math.exp(bound) for bound in (log.low, log.high))
    return Difference(math.exp(log.value), low, high, log.p, log.n, log.notes)


def cliffs_delta(sample: ArrayLike, control: ArrayLike) -> Effect:
    """Share of pairs in which `sample` is larger minus share in which it is smaller (Cliff 1993).

    The words are those of Romano et al. 2006.

    >>> cliffs_delta([1, 2, 3], [2, 3, 4])
    Effect(delta=-0.5555555555555556, size='large')
    """
    x, y = check_pair(sample, control, False)
    delta = float(np.sign(x[:, None] - y[None, :]).mean())
    return Effect(delta, EFFECTS[bisect_right((0.147, 0.33, 0.474), abs(delta))])


def mann_whitney(sample: ArrayLike, control: ArrayLike) -> Significance:
    """Two-sided Mann–Whitney U test (`scipy.stats.mannwhitneyu`), exact for small samples without ties.

    >>> mann_whitney([1, 2, 3], [4, 5, 6]).p
    0.1
    """
    from scipy import stats

    x, y = check_pair(sample, control, False)
    n, together = (len(x), len(y)), np.concatenate([x, y])
    if len(np.unique(together)) == 1:
        return Significance(len(x) * len(y) / 2, 1.0, n, notes=("all values are equal",))
    exact = len(np.unique(together)) == len(together) and min(n) <= 8  # SciPy's rule for method="auto"
    statistic, p = stats.mannwhitneyu(x, y, alternative="two-sided", method="exact" if exact else "asymptotic")
    return Significance(float(statistic), float(p), n, exact)


def equivalence(
    sample: ArrayLike, control: ArrayLike, *, margin: float = 0.5, alpha: float = 0.05, paired: bool = False
) -> Equivalence:
    """TOST and non-inferiority of `sample` against `control` by two one-sided t-tests (Schuirmann 1987).

    Larger values are taken to be better. The margin must be fixed before the data are seen.

    **Arguments:**

    - `sample`, `control`: values of shape `(n,)` and `(m,)`, for instance top-1 in percent.
    - `margin`: the largest loss that is acceptable, in the unit of the values.
    - `alpha`: error rate of each one-sided test.
    - `paired`: entry i of both belongs together; needs n = m.

    >>> e = equivalence([90.0, 90.2, 90.1, 89.9], [90.1, 90.0, 90.2, 89.9], margin=0.5)
    >>> e.equivalent, e.not_worse, round(e.p, 4)
    (True, True, 0.0008)
    """
    if margin <= 0:
        raise ConfigError(f"margin is {margin}; it must be above 0, in the unit of the values (default 0.5 points)")
    inner = mean_difference(sample, control, confidence=1 - 2 * alpha, paired=paired)
    if inner.low is None:
        return Equivalence(inner.value, None, None, None, inner.n, inner.notes, alpha)
    x, y = check_pair(sample, control, paired)
    not_worse = float(_t_test(x + margin, y, paired, "greater").pvalue)
    not_better = float(_t_test(x - margin, y, paired, "less").pvalue)
    p = max(not_worse, not_better)
    return Equivalence(inner.value, inner.low, inner.high, p, inner.n, (), alpha, not_worse, not_better)


def _t_test(x: Array, y: Array, paired: bool, alternative: Literal["two-sided", "greater", "less"]) -> Any:
    """Welch's t-test, or the paired one."""
    from scipy import stats

    with warnings.catch_warnings():
        # One side without spread is fine as long as the other has some; SciPy warns of it all the same.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        if paired:
            return stats.ttest_rel(x, y, alternative=alternative)
        return stats.ttest_ind(x, y, equal_var=False, alternative=alternative)


def kruskal_wallis(groups: Samples) -> Significance:
    """Whether at least one group differs in location (Kruskal and Wallis 1952; `scipy.stats.kruskal`).

    **Arguments:**

    - `groups`: name → values, two groups or more.

    **Returns:** H and its p-value. A large p-value is no evidence that the groups are equal.

    >>> result = kruskal_wallis({"a": [1, 2, 3], "b": [4, 5, 6]})
    >>> round(result.statistic, 4), round(result.p, 4)
    (3.8571, 0.0495)
    """
    from scipy import stats

    samples = check_groups(groups, least=2)
    n = tuple(len(x) for x in samples.values())
    if len(np.unique(np.concatenate(list(samples.values())))) == 1:
        return Significance(0.0, 1.0, n, notes=("all values are equal",))
    statistic, p = stats.kruskal(*samples.values())
    return Significance(float(statistic), float(p), n, notes=small_groups(samples))


def dunn(groups: Samples, adjust: Literal["holm"] | None = "holm") -> Pairwise:
    """Dunn's test of all pairs (Dunn 1964): z-tests on mean ranks, corrected for ties.

    Ranks are pooled over all groups, so that the test is weak between neighbours.

    **Arguments:**

    - `groups`: name → values, two groups or more.
    - `adjust`: `"holm"` corrects over all pairs; None gives the uncorrected p-values.

    >>> pairs = dunn({"a": [1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9]})
    >>> round(pairs.p("a", "c"), 4)
    0.0219
    """
    samples = check_groups(groups, least=2)
    names = tuple(samples)
    if len(np.unique(np.concatenate(list(samples.values())))) == 1:
        return Pairwise(names, ((1.0,) * len(names),) * len(names), ("all values are equal",))
    from scipy import stats

    together = np.concatenate(list(samples.values()))
    total, sizes = len(together), np.array([len(x) for x in samples.values()])
    ranks = np.split(stats.rankdata(together), np.cumsum(sizes)[:-1])
    means = np.array([x.mean() for x in ranks])
    ties = np.unique(together, return_counts=True)[1]
    variance = total * (total + 1) / 12 - float((ties**3 - ties).sum()) / (12 * (total - 1))
    z = np.abs(means[:, None] - means) / np.sqrt(variance * (1 / sizes[:, None] + 1 / sizes))
    p = 2 * stats.norm.sf(z)
    if adjust == "holm":
        upper = np.triu_indices(len(names), 1)
        p[upper] = holm(p[upper].tolist())
        p.T[upper] = p[upper]
    matrix = tuple(tuple(float(entry) for entry in row) for row in p)
    return Pairwise(names, matrix, small_groups(samples))


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Holm's step-down correction (Holm 1979); None entries stay None and are not counted.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return tuple(adjusted)
