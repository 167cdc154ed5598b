"""Training and evaluating networks, on Lightning Fabric."""

from __future__ import annotations

from .evaluate import Metrics, evaluate
from .loggers import TRACKERS, Tracker, check_trackers, tracking
from .loop import train
from .recipe import Recipe
from .run import Callback, History, Row, Run

__all__ = [
    "TRACKERS",
    "Callback",
    "History",
    "Metrics",
    "Recipe",
    "Row",
    "Run",
    "Tracker",
    "check_trackers",
    "evaluate",
    "tracking",
    "train",
]
