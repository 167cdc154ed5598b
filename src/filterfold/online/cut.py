"""One cut during training: what goes, the repair after it, the result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VerificationError
from ..graph import Traced, rewrite_stale_sizes
from ..plan import AttributeChange, ChannelGroup, Plan
from ..pruning.reconstruction import reestimate, repair
from ..surgery.apply import Rewrite
from ..surgery.verdict import Verification
from ..surgery.verify import rehearse
from ..utils.distributed import decided
from ..utils.inputs import informative_inputs, outputs
from ..utils.model_state import preserved
from ..utils.modules import named_tensors, unwrap
from .assign import along
from .folding import FILTER_ROLES, FoldBound
from .options import CENTROID, CutOptions

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


def apply_remedy(options: CutOptions, model: nn.Module, before: nn.Module | None, plan: Plan) -> None:
    """Measure batch norms anew, or, with the network before the cut, solve the next layers' kernels as well."""
    assert options.loader is not None
    if before is None:
        reestimate(model, options.loader)
    else:
        repair(model, before, plan, options.loader)


def write_back(groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], model: nn.Module) -> None:
    """Replace every filter by its cluster's mean and remove nothing: what a naive reading of the document does.

    Only filters change, in place; the network stays as large and as slow as it was.
    """
    tensors = dict(named_tensors(unwrap(model)))
    for group in groups:
        if group.name not in labels:
            continue
        label = labels[group.name].cpu()
        for piece in (piece for piece in group.producers if piece.role in FILTER_ROLES):
            rows = tensors[piece.tensor].detach().movedim(piece.axis, 0)
            positions, slot = along(piece, label)
            place = (torch.arange(len(slot)) if positions is None else positions).to(rows.device)
            slot = slot.to(rows.device)
            total = rows.new_zeros(int(slot.max()) + 1, *rows.shape[1:]).index_add_(0, slot, rows[place])
            mean = total / torch.bincount(slot).view(-1, *[1] * (rows.ndim - 1)).to(rows)
            rows.index_copy_(0, place, mean[slot])


def sizes_rewriter(groups: Traced) -> Rewrite:
    """What finds the sizes in the model's own code that a cut makes wrong; `groups`: of the uncut network."""

    def rewrite(
        pruned: nn.Module, plan: Plan, inputs: Any, *, among: Sequence[AttributeChange] | None = None
    ) -> tuple[AttributeChange, ...]:
        return rewrite_stale_sizes(pruned, plan, groups, inputs, among=among)

    return rewrite


def rehearsed(plan: Plan, model: nn.Module, groups: Traced, example_inputs: Any) -> Verification:
    """Hold a cut against the masked network; where several processes train, rank 0 does.

    **Raises:** `VerificationError` if the cut network would not equal the masked one.
    """
    verified = decided(lambda: rehearse(model, plan, example_inputs, groups=groups, rewrite=sizes_rewriter(groups)))
    if not verified.ok:
        raise VerificationError(f"the cut was not made: {verified.message}")
    return verified


Undo = Callable[[Callable[[], None]], None]
"""Registers what takes a step back."""


@contextmanager
def all_or_nothing(*owners: object) -> Iterator[Undo]:
    """Take everything back if an error leaves the `with` block: what was registered, the last first, then attributes.

    Lists and dictionaries among the owners' attributes get their old content back.

    >>> class Counter:
    ...     seen = 0
    >>> counter, log = Counter(), []
    >>> try:
    ...     with all_or_nothing(counter) as undo:
    ...         counter.seen = 1
    ...         undo(lambda: log.append("taken back"))
    ...         raise ValueError
    ... except ValueError:
    ...     print(counter.seen, log)
    0 ['taken back']
    """
    attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
    values = [value for _, before in attributes for value in before.values()]
    contents = [(value, copy.copy(value)) for value in values if isinstance(value, list | dict)]

    def put_back() -> None:
        for present, before in attributes:
            present.clear()
            present.update(before)
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)

    with ExitStack() as steps:  # which takes all of them, even if one fails

        def undo(step: Callable[[], None]) -> None:
            steps.callback(step)

        undo(put_back)
        yield undo
        steps.pop_all()


def kept_values(model: nn.Module) -> Callable[[], None]:
    """What puts the present values back into all parameters and buffers."""
    before = [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(model)]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    return restore
