"""A network shrinks while it trains, and training goes on; or one network becomes several smaller ones."""

from __future__ import annotations

from .assign import ClusterRow
from .callbacks import DistillationCallback, OnlineCallback
from .children import Child, shrink
from .cosine_pull import averager, pull
from .cut import CutResult
from .distillation import Distillation
from .online_clustering import OnlineFilterClustering
from .options import CutOptions, Pull, Target
from .schedule import Schedule

__all__ = [
    "Child",
    "ClusterRow",
    "CutOptions",
    "CutResult",
    "Distillation",
    "DistillationCallback",
    "OnlineCallback",
    "OnlineFilterClustering",
    "Pull",
    "Schedule",
    "Target",
    "averager",
    "pull",
    "shrink",
]
