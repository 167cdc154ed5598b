"""Repair without training: what a cut did to the layers behind it is made good from a few batches of images.

Two remedies, from cheap to thorough. `reestimate` measures the batch norms' statistics anew. `repair` solves each
layer behind the cut once more, in closed form: with X its input in the cut network, T its output in the uncut one and
W₀ its present kernels, it takes W₀ + Δ with

    Δ = argmin ‖X (W₀ + Δ) - T‖² + λ ‖Δ‖² = (XᵀX + λ)⁻¹ Xᵀ(T - X W₀),     λ = ridge · mean diagonal of XᵀX,

so that a layer never becomes worse on the images that it is solved on. The ridge is chosen for each layer by solving
on half of the images and judging on the other half: with one that is too small, kernels fit the images they were
solved on and nothing else. Layers are solved in the order in which they run, each reading what the repaired ones
before it give: the uncut network runs once to say what each should give, the cut one once, solved on the way. The idea
is that of ThiNet (Luo et al., ICCV 2017), which scales the kept channels by least squares, and of channel pruning (He
et al., ICCV 2017), which re-solves whole kernels as here; both choose the channels by the same error, here any cut may
come first, folds too.

`products` says how the rows of every kind of operation are gathered, `operations` which parameters they belong to,
`passes` what is done in both passes, `least_squares` how a layer is solved.
"""

from __future__ import annotations

from .calibration import reestimate
from .passes import RepairedLayer
from .repair import Repair, repair

__all__ = ["Repair", "RepairedLayer", "reestimate", "repair"]
