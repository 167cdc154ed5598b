"""Two samples: differences with intervals, effect size, rank test, and equivalence against a margin."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from .results import Difference, Effect, Equivalence, Significance, Summary
from .samples import check_pair, check_sample, no_spread


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
    from scipy import stats

    x, y = check_pair(sample, control, paired)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; it must lie between 0 and 1, for instance 0.95")
    value, n = float(x.mean() - y.mean()), (len(x), len(y))
    reason = no_spread(x, y, paired)
    if reason:
        return Difference(value, None, None, confidence, None, n, paired, (reason,))
    with warnings.catch_warnings():
        # One side without spread is fine as long as the other has some; SciPy warns of it all the same.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        test = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
    interval = test.confidence_interval(confidence)
    return Difference(value, float(interval.low), float(interval.high), confidence, float(test.pvalue), n, paired)


def mean_ratio(sample: ArrayLike, control: ArrayLike, *, confidence: float = 0.95, paired: bool = False) -> Difference:
    """Geometric mean of `sample` over that of `control`, with interval and p-value: the form for times.

    The t-test of `mean_difference` on logarithms; a value of .5 means half as long.

    >>> mean_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]).value
    0.5
    """
    x, y = check_pair(sample, control, paired)
    if min(x.min(), y.min()) <= 0:
        raise ConfigError(f"a ratio needs values above 0, but one is {min(x.min(), y.min()):g}")
    log = mean_difference(np.log(x), np.log(y), confidence=confidence, paired=paired)
    low, high = (None if bound is None else math.exp(bound) for bound in (log.low, log.high))
    return Difference(math.exp(log.value), low, high, confidence, log.p, log.n, paired, log.notes)


def cliffs_delta(sample: ArrayLike, control: ArrayLike) -> Effect:
    """Share of pairs in which `sample` is larger minus share in which it is smaller (Cliff 1993).

    The words are those of Romano et al. 2006: below .147, .33, .474 and above.

    >>> cliffs_delta([1, 2, 3], [2, 3, 4])
    Effect(delta=-0.5555555555555556, size='large')
    """
    x, y = check_pair(sample, control, False)
    delta = float(np.sign(x[:, None] - y[None, :]).mean())
    strength = abs(delta)
    if strength < 0.147:
        return Effect(delta, "negligible")
    if strength < 0.33:
        return Effect(delta, "small")
    return Effect(delta, "medium" if strength < 0.474 else "large")


def mann_whitney(sample: ArrayLike, control: ArrayLike) -> Significance:
    """Two-sided Mann–Whitney U test (`scipy.stats.mannwhitneyu`), exact for small samples without ties.

    >>> mann_whitney([1, 2, 3], [4, 5, 6]).p
    0.1
    """
    from scipy import stats

    x, y = check_pair(sample, control, False)
    n, together = (len(x), len(y)), np.concatenate([x, y])
    if len(np.unique(together)) == 1:
        return Significance("Mann–Whitney", len(x) * len(y) / 2, 1.0, n, notes=("all values are equal",))
    exact = len(np.unique(together)) == len(together) and min(n) <= 8  # SciPy's rule for method="auto"
    statistic, p = stats.mannwhitneyu(x, y, alternative="two-sided", method="exact" if exact else "asymptotic")
    return Significance("Mann–Whitney", float(statistic), float(p), n, exact)


def equivalence(
    sample: ArrayLike, control: ArrayLike, *, margin: float = 0.5, alpha: float = 0.05, paired: bool = False
) -> Equivalence:
    """TOST and non-inferiority of `sample` against `control` (Schuirmann 1987; `statsmodels` `ttost_ind`).

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
        return Equivalence(inner.value, None, None, margin, alpha, None, None, inner.n, paired, inner.notes)
    from statsmodels.stats.weightstats import ttost_ind, ttost_paired

    x, y = check_pair(sample, control, paired)
    result: Any
    result = ttost_paired(x, y, -margin, margin) if paired else ttost_ind(x, y, -margin, margin, usevar="unequal")
    lower, upper = float(result[1][1]), float(result[2][1])
    return Equivalence(inner.value, inner.low, inner.high, margin, alpha, lower, upper, inner.n, paired)
