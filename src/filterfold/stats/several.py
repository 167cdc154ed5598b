"""Several groups at once: Kruskal–Wallis, Dunn, Holm, and every method against one control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..errors import ConfigError
from .permutations import permutation
from .results import AgainstControl, Pairwise, Significance
from .samples import Samples, check_groups, small_groups
from .two import mann_whitney


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
        return Significance("Kruskal–Wallis", 0.0, 1.0, n, notes=("all values are equal",))
    statistic, p = stats.kruskal(*samples.values())
    return Significance("Kruskal–Wallis", float(statistic), float(p), n, notes=small_groups(samples))


def dunn(groups: Samples, adjust: Literal["holm"] | None = "holm") -> Pairwise:
    """Dunn's test of all pairs (Dunn 1964; `scikit_posthocs.posthoc_dunn`).

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
        return Pairwise("Dunn", adjust, names, ((1.0,) * len(names),) * len(names), ("all values are equal",))
    import scikit_posthocs

    raw = scikit_posthocs.posthoc_dunn([x.tolist() for x in samples.values()], p_adjust=None).to_numpy(copy=True)
    if adjust == "holm":
        upper = np.triu_indices(len(names), 1)
        raw[upper] = holm(raw[upper].tolist())
        raw.T[upper] = raw[upper]
    matrix = tuple(tuple(float(p) for p in row) for row in raw)
    return Pairwise("Dunn", adjust, names, matrix, small_groups(samples))


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Holm's step-down correction (Holm 1979); None entries stay None and are not counted.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    # statsmodels' multipletests does the same, but collects garbage at every call: .2 s beside torch.
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return tuple(adjusted)


def against_control(
    groups: Samples,
    control: str,
    *,
    test: Literal["permutation", "mann-whitney"] = "permutation",
    paired: bool = False,
) -> tuple[AgainstControl, ...]:
    """Every other group against `control`, p-values corrected by Holm over these comparisons only.

    >>> result = against_control({"c": [1, 2, 3, 4], "a": [5, 6, 7, 8], "b": [1, 3, 2, 4]}, "c")
    >>> [(r.name, round(r.p, 4), round(r.p_adjusted, 4)) for r in result]
    [('a', 0.0286, 0.0571), ('b', 1.0, 1.0)]
    """
    samples = check_groups(groups, least=2)
    if control not in samples:
        raise ConfigError(f"no group is called {control!r}; the groups are {', '.join(samples)}")
    others = [name for name in samples if name != control]
    found = [
        permutation(samples[name], samples[control], paired=paired)
        if test == "permutation"
        else mann_whitney(samples[name], samples[control])
        for name in others
    ]
    corrected = holm([result.p for result in found])
    return tuple(
        AgainstControl(name, result.p, adjusted, result.exact, result.notes)
        for name, result, adjusted in zip(others, found, corrected, strict=True)
    )
