"""Online filter clustering: the network shrinks while it trains, and training goes on."""

from .callback import OnlineCallback
from .filters import OnlineFilterClustering
from .grouping import ClusterRow
from .pull import averager, pull
from .result import CutResult
from .schedule import Schedule
from .targets import Target

__all__ = [
    "ClusterRow",
    "CutResult",
    "OnlineCallback",
    "OnlineFilterClustering",
    "Schedule",
    "Target",
    "averager",
    "pull",
]
