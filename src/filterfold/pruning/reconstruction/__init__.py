"""Repair without training: what a cut did to the layers behind it is made good from a few batches of images.

Two remedies, from cheap to thorough. `reestimate` measures the batch norms' statistics anew. `repair` solves each
layer that reads cut channels once more, in closed form: with X its input in the cut network, T its output in the uncut
one and W₀ its present kernels, it takes W₀ + Δ with

    Δ = argmin ‖X (W₀ + Δ) - T‖² + λ ‖Δ‖² = (XᵀX + λ)⁻¹ Xᵀ(T - X W₀),     λ = ridge · mean diagonal of XᵀX,

so that a layer never becomes worse on the images that it is solved on. The ridge is chosen for each layer by solving
on half of the images and judging on the other half: with one that is too small, kernels fit the images they were
solved on and nothing else. Layers are solved in the order in which they run, each reading what the repaired ones
before it give. The idea is that of ThiNet (Luo et al., ICCV 2017), which scales the kept channels by least squares,
and of channel pruning (He et al., ICCV 2017), which re-solves whole kernels as here; both choose the channels by the
same error, here any cut may come first, folds too.
"""

from __future__ import annotations

from .calibration import reestimate
from .least_squares import Inputs, observed, ridged, unsolvable
from .repair import Repair, RepairedLayer, repair

__all__ = ["Inputs", "Repair", "RepairedLayer", "observed", "reestimate", "repair", "ridged", "unsolvable"]
