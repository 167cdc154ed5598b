"""Whole experiments as TOML files: base training, what is pruned, retraining, and the figures to be held against.

`names` lists those that come with the package (every row of Table 1 of Li et al. 2017), `load` reads one of them or a
file of the user's own.
"""

from __future__ import annotations

from .recipe import Figures, Paper, PruningRecipe, Rule, load, names, read, to_toml

__all__ = ["Figures", "Paper", "PruningRecipe", "Rule", "load", "names", "read", "to_toml"]
