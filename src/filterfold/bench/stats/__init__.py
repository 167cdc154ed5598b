"""Statistics that hold up: what a comparison of a few trials a method can and can't show.

Arrays in, small results out; this module knows no trials. The tests themselves are those of SciPy,
scikit-posthocs and statsmodels. What is added here: order and names of the groups are kept, Holm's
correction is applied where several comparisons are made, and whatever a test can't say (a group
without spread, groups under five) comes back as a note in words instead of a warning or a NaN.
"""

from __future__ import annotations

from .power import resolvable_difference, trials_needed
from .results import AgainstControl, Difference, Effect, Equivalence, Pairwise, Significance, Summary
from .tests import (
    against_control,
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
    summarise,
)

__all__ = [
    "AgainstControl",
    "Difference",
    "Effect",
    "Equivalence",
    "Pairwise",
    "Significance",
    "Summary",
    "against_control",
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
    "resolvable_difference",
    "summarise",
    "trials_needed",
]
