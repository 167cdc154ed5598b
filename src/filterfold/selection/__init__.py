"""From scores or clusters and a budget to a plan.

Every group gets an *order* of its units, the most wanted first, such that any number of units from
its front respects the group's classes and blocks; and the numbers of units that it may keep
(`round_to`, `min_keep`). What remains is to choose one number per group: given directly by a keep
ratio, searched exactly for a budget, or found by measuring time.
"""

from .folding import from_clusters
from .forecast import predict
from .latency import LatencyBudget, select_for_latency
from .ratio import cuttable, select, select_greedily

__all__ = ["LatencyBudget", "cuttable", "from_clusters", "predict", "select", "select_for_latency", "select_greedily"]
