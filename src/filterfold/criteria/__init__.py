"""Which units matter: criteria turn a channel group into scores, higher = keep.

`score` is the verb, `CRITERIA` the registry, `@criterion("name")` adds to it.
"""

from . import activations, gradients, reconstruction, weights
from .registry import CRITERIA, Criterion, criterion
from .rows import COMBINE, combined, filters, unit_rows
from .scoring import score

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
