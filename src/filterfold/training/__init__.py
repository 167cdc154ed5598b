"""Training and evaluating networks, on Lightning Fabric."""

from __future__ import annotations

from .evaluate import Metrics, evaluate
from .loop import train
from .recipe import Recipe
from .run import Callback, History, Run

__all__ = ["Callback", "History", "Metrics", "Recipe", "Run", "evaluate", "train"]
