"""From scores and a budget to a plan.

Every group gets an *order* of its units, the most wanted first, such that any number of units from
its front respects the group's classes and blocks; and the numbers of units that it may keep
(`round_to`, `min_keep`). What remains is to choose one number per group: given directly by a keep
ratio, searched exactly for a budget, or found by measuring time.
"""

from __future__ import annotations

from ...profiling.predict import predict
from .latency import select_for_latency
from .options import Budget, LatencyBudget, Selection
from .patterns import cuttable
from .select import choose, select, select_greedily

__all__ = [
    "Budget",
    "LatencyBudget",
    "Selection",
    "choose",
    "cuttable",
    "predict",
    "select",
    "select_for_latency",
    "select_greedily",
]
