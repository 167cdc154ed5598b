"""Power of t-tests: the smallest difference that they show, and the trials that a claim needs."""

from __future__ import annotations

import math

from ...errors import ConfigError


def resolvable_difference(
    n: int, m: int, sd: float, *, alpha: float = 0.05, power: float = 0.8, paired: bool = False
) -> float:
    """The smallest true difference that n against m trials would show in `power` of all experiments.

    Two-sided t-test at `alpha`; `sd` is the spread between trials, or, if `paired`, the spread of the
    differences. The unit is that of `sd`; smaller differences are likely to be missed.

    >>> round(resolvable_difference(5, 5, 0.15), 2)
    0.3
    """
    from scipy.optimize import brentq

    if min(n, m) < 2:
        return math.inf
    df, size = (n - 1, n) if paired else (n + m - 2, n * m / (n + m))

    def missing(effect: float) -> float:
        return _power(effect * math.sqrt(size), df, alpha / 2, both=True) - power

    high = 1.0
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 1e-6, high)) * sd


def _power(shift: float, df: float, tail: float, both: bool = False) -> float:
    """Chance that a t statistic of noncentrality `shift` lies beyond the quantile of `tail`, at one end or at both.

    The same as the solvers of statsmodels, which give NaN where the far end is next to impossible (SciPy's `nct`).
    """
    from scipy.special import nctdtr, stdtrit

    critical = float(stdtrit(df, 1 - tail))
    far = float(nctdtr(df, shift, -critical)) if both else 0.0
    return 1 - float(nctdtr(df, shift, critical)) + (0.0 if math.isnan(far) else far)


def trials_needed(sd: float, margin: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Trials a method so that "no worse by the margin" is shown in `power` of all experiments if it is true.

    Assumes equal means and the same spread `sd` on both sides; one-sided t-test at `alpha`.

    >>> trials_needed(0.15, 0.5), trials_needed(0.6, 0.5)
    (3, 19)
    """
    if margin <= 0:
        raise ConfigError(f"margin is {margin}; it must be above 0, in the unit of the values")
    if sd <= 0:
        return 2
    n = 2
    while _power(margin / sd * math.sqrt(n / 2), 2 * n - 2, alpha) < power and n < 100_000:
        n += 1 if n < 100 else n // 20
    return n
