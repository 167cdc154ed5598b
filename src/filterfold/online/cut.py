"""One cut during training: what goes, the repair after it, the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, VerificationError
from ..graph import Traced, rewrite_stale_sizes
from ..plan import AttributeChange, ChannelGroup, Cut, Plan, keep_units
from ..pruning.reconstruction import reestimate, repair
from ..surgery.apply import apply, apply_with_sizes
from ..surgery.verdict import Verification
from ..surgery.verify import rehearse
from ..utils.distributed import decided
from ..utils.inputs import informative_inputs, outputs
from ..utils.model_state import preserved
from ..utils.modules import named_tensors, unwrap
from .assign import ROWS, along
from .folding import FoldBound, parts

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
    with preserved(model):
        found = outputs(model, informative_inputs(example_inputs))
    return [value.detach().clone() for value in found if value.is_floating_point()]


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """‖after - before‖ / ‖before‖ over all outputs together; infinite where shapes differ."""
    if any(one.shape != two.shape for one, two in zip(before, after, strict=True)):
        return float("inf")
    change = sum(float((two.double() - one.double()).square().sum()) for one, two in zip(before, after, strict=True))
    size = sum(float(one.double().square().sum()) for one in before)
    return float((change / size) ** 0.5) if size else float(change**0.5)


Remedy = Literal["norms", "kernels"]


REMEDIES: tuple[Remedy, ...] = ("norms", "kernels")


def check(remedy: Remedy | None, loader: Iterable[Any] | None) -> None:
    """**Raises:** `ConfigError` for an unknown remedy, or one without the batches that it needs."""
    if remedy is None:
        return
    if remedy not in REMEDIES:
        raise ConfigError(f"unknown remedy {remedy!r}: {' or '.join(REMEDIES)}")
    if loader is None:
        raise ConfigError(f"remedy={remedy!r} needs a loader with a few batches of training images")


def remembered(model: nn.Module, remedy: Remedy | None) -> nn.Module | None:
    """The uncut network, where the remedy will ask for it."""
    return copy.deepcopy(model) if remedy == "kernels" else None


def mend(
    remedy: Remedy | None, model: nn.Module, before: nn.Module | None, plan: Plan, loader: Iterable[Any] | None
) -> None:
    """Measure batch norms anew (`norms`), or solve the next layers' kernels again as well (`kernels`), in place."""
    if remedy is None or loader is None:
        return
    if before is None:
        reestimate(model, loader)
    else:
        repair(model, before, plan, loader)


def drop(groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], counts: Mapping[str, Sequence[int]]) -> Plan:
    """Keep the best units of every part of each group.

    **Arguments:**

    - `scores`: group name → `(size,)`, higher = keep; of equal ones the first stay.
    - `counts`: group name → units to keep in each of `parts(group)`.
    """
    cuts = []
    for group in groups:
        if group.name not in counts:
            continue
        kept: list[int] = []
        for part, count in zip(parts(group), counts[group.name], strict=True):
            units = torch.tensor(part.units)
            order = scores[group.name][units].argsort(descending=True, stable=True)
            kept += units[order[:count]].tolist()
        cuts.append(Cut(group.name, keep_units(group.size, kept), group.producers, group.consumers))
    return Plan(tuple(cuts))


def write_back(groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], model: nn.Module) -> None:
    """Replace every filter by its cluster's mean and remove nothing: what a naive reading of the document does.

    Only filters change, in place; the network stays as large and as slow as it was.
    """
    tensors = dict(named_tensors(unwrap(model)))
    for group in groups:
        if group.name not in labels:
            continue
        label = labels[group.name].cpu()
        for piece in (piece for piece in group.producers if piece.role in ROWS):
            rows = tensors[piece.tensor].detach().movedim(piece.axis, 0)
            positions, slot = along(piece, label)
            place = (torch.arange(len(slot)) if positions is None else positions).to(rows.device)
            slot = slot.to(rows.device)
            total = rows.new_zeros(int(slot.max()) + 1, *rows.shape[1:]).index_add_(0, slot, rows[place])
            mean = total / torch.bincount(slot).view(-1, *[1] * (rows.ndim - 1)).to(rows)
            rows.index_copy_(0, place, mean[slot])


def cut_through(
    plan: Plan,
    model: nn.Module,
    groups: Traced,
    example_inputs: Any,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    averaged: nn.Module | Sequence[nn.Module],
    *,
    verify: bool,
) -> tuple[Plan, Verification | None]:
    """Apply a plan to everything together, or to nothing.

    **Returns:** the plan with the sizes in user code that had to change, and what the rehearsal found.

    **Raises:** `VerificationError` if the cut network would not equal the masked one.
    """
    bare = unwrap(model)

    def rewrite(cut: nn.Module, part: Plan, inputs: Any) -> tuple[AttributeChange, ...]:
        return rewrite_stale_sizes(cut, part, groups, inputs)

    if not verify:
        plan, _ = apply_with_sizes(plan, model, example_inputs, rewrite, optimizer=optimizer, averaged=averaged)
        return plan, None
    # by rank 0, where several processes train
    verified = decided(lambda: rehearse(bare, plan, example_inputs, groups=groups, rewrite=rewrite))
    if not verified.ok:
        raise VerificationError(f"the cut was not made: {verified.message}")
    plan = replace(plan, attributes=verified.attributes)
    apply(plan, model, optimizer=optimizer, averaged=averaged)
    return plan, verified
