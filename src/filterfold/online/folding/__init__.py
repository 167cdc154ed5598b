"""Folding: clusters of units become a cut in which one unit stands for each."""

from __future__ import annotations

from .error_bound import FoldBound, bounds
from .fold import Rule, fold, rule_of
from .units import Features, Part, features, importance, parts, share_out, signs

__all__ = [
    "Features",
    "FoldBound",
    "Part",
    "Rule",
    "bounds",
    "features",
    "fold",
    "importance",
    "parts",
    "rule_of",
    "share_out",
    "signs",
]
