"""Which units matter: criteria turn a channel group into scores, higher = keep.

`score` is the verb, `CRITERIA` the registry, `@criterion("name")` adds to it.
"""

from __future__ import annotations

from . import activations, gradients, reconstruction, weights
from .registry import CRITERIA, Criterion, criterion
from .scoring import score
from .unit_rows import COMBINE, combined, filters, unit_rows

__all__ = [
    "COMBINE",
    "CRITERIA",
    "Criterion",
    "activations",
    "combined",
    "criterion",
    "filters",
    "gradients",
    "reconstruction",
    "score",
    "unit_rows",
    "weights",
]
