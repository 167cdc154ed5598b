"""Statistics for comparing methods that were run a few times each.

Arrays in, small results out; this package knows no trials. The tests are those of SciPy. What is added: order and names
of the groups are kept, Holm's correction for several comparisons, power, and notes in words, instead of warnings or
NaN, on what a test can't say (a group without spread, groups of fewer than five).
"""

from __future__ import annotations

from .power import resolvable_difference, trials_needed
from .results import Difference, Effect, Equivalence, Pairwise, Significance, Summary
from .tests import (
    cliffs_delta,
    dunn,
    equivalence,
    holm,
    kruskal_wallis,
    mann_whitney,
    mean_difference,
    mean_interval,
    mean_ratio,
    permutation,
    proportion_interval,
    summarise,
)

__all__ = [
    "Difference",
    "Effect",
    "Equivalence",
    "Pairwise",
    "Significance",
    "Summary",
    "cliffs_delta",
    "dunn",
    "equivalence",
    "holm",
    "kruskal_wallis",
    "mann_whitney",
    "mean_difference",
    "mean_interval",
    "mean_ratio",
    "permutation",
    "proportion_interval",
    "resolvable_difference",
    "summarise",
    "trials_needed",
]
