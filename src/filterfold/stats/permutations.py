"""Permutation tests: full enumeration where it is affordable, seeded random draws beyond."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from .results import Significance
from .samples import Array, check_pair

EXACT_LIMIT = 200_000
"""Enumerate all regroupings up to this many; beyond, draw `DRAWS` of them with a fixed seed."""

DRAWS = 20_000


def permutation(sample: ArrayLike, control: ArrayLike, *, paired: bool = False, seed: int = 0) -> Significance:
    """Two-sided permutation test of the difference in means: no assumption about the distribution.

    Every regrouping of the values (paired: every exchange within pairs) is tried where there are at
    most `EXACT_LIMIT`; otherwise `DRAWS` random ones. The p-value is the share of regroupings whose
    difference is at least as large as the one found (Phipson and Smyth 2010 for random draws).

    >>> permutation([1, 2, 3], [4, 5, 6]).p
    0.1
    """
    x, y = check_pair(sample, control, paired)
    n = (len(x), len(y))
    ways = 2 ** len(x) if paired else math.comb(sum(n), n[0])
    exact = ways <= EXACT_LIMIT
    share = _exchanges(x - y, exact, seed) if paired else _regroupings(x, y, exact, seed)
    notes = []
    if (least := 2 / ways) > 0.05:
        trials = f"{n[0]} pairs" if paired else f"{n[0]} against {n[1]} trials"
        notes.append(f"with {trials} no p-value under {least:.2g} is possible")
    if not exact:
        notes.append(f"estimated from {DRAWS} random regroupings")
    return Significance("permutation", float(x.mean() - y.mean()), share, n, exact, tuple(notes))


def _regroupings(x: Array, y: Array, exact: bool, seed: int) -> float:
    """Share of regroupings with a difference in means as large as the one found; the one found counts."""
    together = np.concatenate([x, y]) - y.mean()  # centred: sums stay small, and so do their rounding errors
    if exact:
        chosen = itertools.combinations(range(len(together)), len(x))
        sums = np.fromiter((together[list(pick)].sum() for pick in chosen), dtype=np.float64)
    else:
        random = np.random.default_rng(seed)
        sums = np.array([random.permutation(together)[: len(x)].sum() for _ in range(DRAWS)])
    expected = together.sum() * len(x) / len(together)
    return _share(np.abs(sums - expected), abs(together[: len(x)].sum() - expected), exact)


def _exchanges(differences: Array, exact: bool, seed: int) -> float:
    """Share of sign patterns with a sum as large as the one found."""
    n = len(differences)
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice([1.0, -1.0], size=(DRAWS, n))
    return _share(np.abs(signs @ differences), abs(differences.sum()), exact)


def _share(found: Array, observed: float, exact: bool) -> float:
    # Equal sums reached in another order differ in the last bits; they are ties and must count.
    hits = int((found >= observed - 1e-9 * max(float(found.max()), 1e-300)).sum())
    return hits / len(found) if exact else (hits + 1) / (len(found) + 1)
