"""Online filter clustering: the network shrinks while it trains, and training goes on."""

from __future__ import annotations

from .assign import ClusterRow
from .callbacks import OnlineCallback
from .cosine_pull import averager, pull
from .cut import CutResult
from .distillation import Distillation
from .online_clustering import OnlineFilterClustering
from .schedule import Schedule
from .targets import Target

__all__ = [
    "ClusterRow",
    "CutResult",
    "Distillation",
    "OnlineCallback",
    "OnlineFilterClustering",
    "Schedule",
    "Target",
    "averager",
    "pull",
]
