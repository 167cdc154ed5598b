"""Folding: clusters of units become a cut in which one unit stands for each."""

from .cut import Rule, fold, rule_of
from .units import Features, Part, features, importance, parts, share_out, signs

__all__ = ["Features", "Part", "Rule", "features", "fold", "importance", "parts", "rule_of", "share_out", "signs"]
