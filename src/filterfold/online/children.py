"""One network, a family of children: several sizes cut from one pretrained network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..plan import Plan
from ..profiling.macs import Cost
from ..pruning.budgets import Budget, Selection
from ..pruning.criteria import Criterion
from ..pruning.reconstruction import Repair, reestimate, repair
from ..pruning.scored import Planned, PruneResult, Rules, Scored, Scoring, scored
from ..utils.arguments import typed
from ..utils.model_state import random_state_preserved
from ..utils.modules import unwrap
from .distillation import Distillation
from .options import Remedy, check_remedy


@dataclass(frozen=True, slots=True)
class Child:
    """One of the networks that `shrink` makes.

    **Arguments:**

    - `share`: of the uncut network's multiply-accumulates that was asked for.
    - `network`: the small network, bare, on the device of the uncut one.
    - `pruned`: what `prune` would have returned: the plan, the cost before and after, the verdict.
    - `repair`: what the repair did, or None without one.
    - `distillation`: the teacher, which knows this child's plan; None unless `shrink` was given one.
    """

    share: float
    network: nn.Module
    pruned: PruneResult
    repair: Repair | None
    distillation: Distillation | None

    @property
    def plan(self) -> Plan:
        """The cut, replayable with `apply` on a copy of the original."""
        return self.pruned.plan

    @property
    def cost(self) -> Cost:
        """The small network's multiply-accumulates and parameters."""
        return self.pruned.after

    def __str__(self) -> str:
        """One line for logs."""
        before, after = self.pruned.before, self.cost
        return (
            f"{self.share:g}: {after.macs:,} MACs ({after.macs / max(1, before.macs):.1%}), "
            f"{after.parameters:,} parameters ({after.parameters / max(1, before.parameters):.1%})"
        )


Train = Callable[[Child], object]
"""The user's own training: trains `child.network` in place, if wanted with `child.distillation`."""


@typed
@torch.inference_mode(mode=False)  # else new tensors could never be trained
def shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    macs: Sequence[float],
    calibration: Iterable[Any],
    batches: int = 8,
    criterion: str | Criterion | Callable[..., Tensor] | None = None,
    selection: Selection | None = None,
    scoring: Scoring | None = None,
    remedy: Remedy | None = "kernels",
    strict: bool = False,
    distillation: Distillation | None = None,
    train: Train | None = None,
) -> Iterator[Child]:
    """Make several smaller networks of one, which stays as it is.

    The network is traced and scored once, and all cuts are chosen and rehearsed before the first is made: a share that
    can't be met is refused at once. Then the children come one by one: each time a copy is cut, repaired, and trained
    if `train` is given. Save each as it comes: `for child in shrink(...): ff.save(child.network, ...)`. Leave `model`
    alone meanwhile.

    Every child is cut from the original, not from the next larger one: it depends on nothing but the original, so
    those that are missing can be made later, and are the same. For a chain call `shrink` on a child's network.

    **Arguments:**

    - `model`: the pretrained network. Nothing of it changes.
    - `example_inputs`: as for `prune`.
    - `macs`: shares of the multiply-accumulates that may remain, one for each child, such as `[0.8, 0.6, 0.4]`.
    - `calibration`: a loader as for `repair`: unlabelled inputs will do, unless the criterion needs targets. Read once,
      and shared by all.
    - `batches`: read at most so many. They are kept in memory.
    - `criterion`: as in `prune`; None: `reconstruction`, or `reconstruction-then-train` with `train`.
    - `scoring`, `strict`: as in `prune`.
    - `selection`: which units may stay; None: `Selection(scope="global")`, ranked over all layers.
    - `remedy`: what is done after each cut: kernels are solved anew ("kernels", see `repair`), batch norms are measured
      anew ("norms", see `reestimate`), or nothing (None).
    - `distillation`: a teacher made of `model` (`Distillation(model)`), shared by all children; see `Child`.
    - `train`: called with each `Child` in turn. What it raises ends the family; children that came before are whole.

    **Returns:** an iterator of `Child`, in the order of `macs`.

    **Raises:** what `prune` does, for any of the shares, `DataError` if there are no calibration inputs, and
    `ConfigError` for shares that are no shares or come twice.

    ```python
    >>> import filterfold as ff
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> images = torch.randn(32, 3, 8, 8)
    >>> for child in ff.shrink(net, images[:1], macs=[0.8, 0.4], calibration=[images]):
    ...     print(child, child.network[0].out_channels < 8)
    0.8: ...
    0.4: ...

    ```
    """
    shares = list(macs)
    if not shares or len(set(shares)) < len(shares):
        raise ConfigError(f"macs={shares}: give a share for each child, each once, such as [0.8, 0.6, 0.4]")
    check_remedy(remedy)
    if distillation is not None and train is None:
        raise ConfigError("distillation= has no effect without train=: leave it out")
    if batches < 1:
        raise ConfigError(f"batches={batches}: at least 1")
    budgets = [Budget(macs=share) for share in shares]
    criterion = criterion or ("reconstruction" if train is None else "reconstruction-then-train")
    rules = Rules(criterion, selection or Selection(scope="global"), scoring or Scoring(), True, strict)
    for budget in budgets:
        rules.check(budget)
    inner = unwrap(model)
    with random_state_preserved(inner):
        inputs = list(islice(calibration, batches))
    if not inputs:
        raise DataError("calibration: the loader gave no batch")
    network = scored(inner, example_inputs, rules, inputs)
    family = _Family(network, inputs, remedy, distillation, train)
    return family.children(shares, [network.planned(budget) for budget in budgets])


@dataclass(frozen=True, slots=True)
class _Family:
    """What all children share."""

    network: Scored
    inputs: Sequence[Any]
    remedy: Remedy | None
    distillation: Distillation | None
    train: Train | None

    def children(self, shares: Sequence[float], planned: Sequence[Planned]) -> Iterator[Child]:
        """Make them one by one."""
        for share, cut in zip(shares, planned, strict=True):
            yield self._child(share, cut)

    @torch.inference_mode(mode=False)
    def _child(self, share: float, planned: Planned) -> Child:
        original = self.network.model
        small = copy.deepcopy(original)
        pruned = self.network.cut(planned, small)
        repaired = None
        if self.remedy == "kernels":
            repaired = repair(small, original, pruned.plan, self.inputs, batches=len(self.inputs))
        elif self.remedy == "norms":
            reestimate(small, self.inputs, batches=len(self.inputs))
        taught = None if self.distillation is None else self.distillation.for_student(small, pruned.plan)
        child = Child(share, small, pruned, repaired, taught)
        if self.train is not None:
            try:
                self.train(child)
            finally:
                if taught is not None:
                    taught.remove()
        return child
