"""The cut itself, for `prune` and online clustering: a plan applied, and sizes in user code rewritten with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, FilterfoldError
from ..graph import Traced, rewrite_stale_sizes
from ..plan import Plan
from ..profiling.macs import Cost, measure
from ..surgery.apply import Cuttings, Receipt, apply, revert
from ..utils.modules import unwrap

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True, slots=True)
class CutNetwork:
    """What `cut` did: the plan with the sizes that had to change, the way back, and the cost of the cut network.

    The cost is None where the network was not run.
    """

    plan: Plan
    receipt: Receipt
    cost: Cost | None


def cut(
    plan: Plan,
    model: nn.Module,
    traced: Traced,
    example_inputs: Any,
    *,
    optimizer: Optimizers = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    cuttings: Cuttings | None = None,
    tried: bool = False,
) -> CutNetwork:
    """Apply a plan to everything together, or to nothing.

    The cut network is run. Where it stumbles over sizes in user code, all is taken back and cut once more with these
    rewritten, as one transaction, so that averaged copies change too.

    **Arguments:**

    - `plan`, `model`, `optimizer`, `averaged`, `cuttings`: see `apply`.
    - `traced`, `example_inputs`: of the uncut network.
    - `tried`: whether a rehearsal has run the network with just this plan: then it is not run again.

    **Raises:** what `apply` and the network raise; everything is then as before.
    """
    receipt = apply(plan, model, optimizer=optimizer, averaged=averaged, cuttings=cuttings)
    if tried:
        return CutNetwork(plan, receipt, None)
    bare = unwrap(model)
    try:
        return CutNetwork(plan, receipt, measure(bare, example_inputs))
    except FilterfoldError:
        pass
    except BaseException:
        receipt.rollback()
        raise
    try:
        changes = rewrite_stale_sizes(bare, plan, traced, example_inputs)
        revert(changes, bare)
    finally:
        receipt.rollback()
    plan = replace(plan, attributes=(*plan.attributes, *changes))
    receipt = apply(plan, model, optimizer=optimizer, averaged=averaged)
    try:
        return CutNetwork(plan, receipt, measure(bare, example_inputs))
    except BaseException:
        receipt.rollback()
        raise


def check_optimizers(optimizer: Optimizers, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of a network's parameters: it was made for another one."""
    own = {id(parameter) for parameter in model.parameters()}
    for entry in optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]:
        if not isinstance(entry, torch.optim.Optimizer):
            raise ConfigError(f"optimizer={type(entry).__name__}: must be a torch.optim.Optimizer, or several")
        if not any(id(parameter) in own for group in entry.param_groups for parameter in group["params"]):
            raise ConfigError(f"{type(entry).__name__} holds no parameter of this model: was it built for another one?")
