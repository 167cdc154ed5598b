"""Folding: clusters of units become a cut in which one unit stands for each."""

from __future__ import annotations

from .error_bound import BoundMeasurement, FoldBound, bounds
from .fold import Rule, fold, rule_of
from .units import FILTER_ROLES, Features, features, importance, signs

__all__ = [
    "FILTER_ROLES",
    "BoundMeasurement",
    "Features",
    "FoldBound",
    "Rule",
    "bounds",
    "features",
    "fold",
    "importance",
    "rule_of",
    "signs",
]
