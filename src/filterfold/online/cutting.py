"""One cut through model, optimizer state and averaged copies, rehearsed first if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import VerificationError
from ..graph import Traced, repair
from ..plan import Plan
from ..ranks import decided
from ..structure import unwrap
from ..surgery import apply, revert
from ..verify import Verification, rehearse


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
    bare, verified = unwrap(model), None
    if verify:
        verified = decided(  # by rank 0, where several processes train
            lambda: rehearse(
                bare,
                plan,
                example_inputs,
                groups=groups,
                repair=lambda copy, part, inputs: repair(copy, part, groups, inputs),
            )
        )
        if not verified.ok:
            raise VerificationError(f"the cut was not made: {verified.message}")
        plan = replace(plan, attributes=verified.attributes)
    receipt = apply(plan, model, optimizer=optimizer, averaged=averaged)
    if not verify:
        try:
            changes = repair(bare, plan, groups, example_inputs)
        except BaseException:
            receipt.rollback()
            raise
        if changes:  # once more as one transaction, so that averaged copies change too
            revert(changes, bare)
            receipt.rollback()
            plan = replace(plan, attributes=changes)
            apply(plan, model, optimizer=optimizer, averaged=averaged)
    return plan, verified
