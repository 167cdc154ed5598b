"""What a cut did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..borrowing import borrowed, outputs, telling
from ..folding import FoldBound
from ..plan import Plan
from ..verify import Verification

FOLD, CENTROID = "fold", "centroid"
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative change of the output below which a cut changed nothing but rounding; 1e-2 for shorter types."""


@dataclass(frozen=True, slots=True)
class CutResult:
    """What `cluster_and_prune()` did.

    **Arguments:**

    - `method`: "fold", "centroid" or a criterion's name.
    - `plan`: the cut that was applied; its `widths` say how many units each group had and has.
    - `macs`: multiply-accumulates of one example before and after.
    - `change`: relative change ‖after - before‖ / ‖before‖ of the outputs on the example inputs, in eval mode.
    - `exact`: whether that is no more than rounding.
    - `verified`: what `verify.rehearse` found, or None if it was not asked.
    - `bounds`: group → how much at most its cut, by itself, changes what the layers that read it give (see
      `FoldBound`); groups for which none is known are left out.
    """

    method: str
    plan: Plan
    macs: tuple[int, int]
    change: float
    exact: bool
    verified: Verification | None
    bounds: Mapping[str, FoldBound] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for logs and records."""
        if self.method == CENTROID:
            return f"centroid: nothing removed, output changed by {self.change:.2g}"
        before = sum(width[0] for width in self.plan.widths.values())
        after = sum(width[1] for width in self.plan.widths.values())
        share = self.macs[1] / max(self.macs[0], 1)
        how = "unchanged" if self.exact else f"changed by {self.change:.2g}"
        return f"{self.method}: {before} -> {after} units, {share:.2f} of the MACs, output {how}"


def observed(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Floating-point outputs on the example inputs (noise where those are constant), in eval mode."""
    with borrowed(model):
        found = outputs(model, telling(example_inputs))
    return [value.detach().clone() for value in found if value.is_floating_point()]


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """‖after - before‖ / ‖before‖ over all outputs together; infinite where shapes differ."""
    if any(one.shape != two.shape for one, two in zip(before, after, strict=True)):
        return float("inf")
    change = sum(float((two.double() - one.double()).square().sum()) for one, two in zip(before, after, strict=True))
    size = sum(float(one.double().square().sum()) for one in before)
    return float((change / size) ** 0.5) if size else float(change**0.5)
