"""What may be done for a network right after a cut, before training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError
from ..plan import Plan
from ..reconstruction import reestimate, repair

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
