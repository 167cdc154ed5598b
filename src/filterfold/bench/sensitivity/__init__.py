"""How much each layer can lose: every layer pruned alone, without retraining (Li et al. 2017, section 3.3).

`sweep` measures, `Sensitivity` is what was measured, `suggest` derives ratios from it.
"""

from __future__ import annotations

from .curves import Layer, Point, Sensitivity
from .suggestion import Suggestion, suggest
from .sweep_layers import RATIOS, sweep

__all__ = ["RATIOS", "Layer", "Point", "Sensitivity", "Suggestion", "suggest", "sweep"]
