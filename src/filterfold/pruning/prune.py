"""The one verb: trace, score, select, rehearse, cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FilterfoldError, SelectionError
from ..graph import Traced, groups_behind_numbers, rewrite_stale_sizes, trace_and_measure
from ..plan import AttributeChange, ChannelGroup, Plan
from ..profiling.macs import Cost, measure
from ..surgery.apply import apply_with_sizes
from ..surgery.cut_cache import CutCache
from ..surgery.verdict import Verification
from ..surgery.verify import rehearse
from ..utils.modules import unwrap
from .budgets import Budget, LatencyBudget, Selection, choose, cuttable, select_for_latency, select_greedily
from .budgets.patterns import merged
from .criteria import Criterion, score
from .culprits import FAILED, passing_plan

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a criterion is applied.

    **Arguments:**

    - `order`: `"independent"`: all groups are scored as the network is; `"greedy"`: group by group, and the kernels of
      channels dropped further up don't count for a filter (see `select_greedily`; weight criteria and `keep` only).
    - `follow`: `"shortcut"`: projection shortcuts decide for the layers coupled with them, see `score`.
    - `seed`: of random criteria.
    """

    order: Literal["independent", "greedy"] = "independent"
    follow: Literal["shortcut"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.order not in ("independent", "greedy"):
            raise ConfigError(f"scoring: order={self.order!r} must be 'independent' or 'greedy'")


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What `prune` did.

    **Arguments:**

    - `plan`: the cut that was made, replayable with `apply` on a copy of the original.
    - `before`, `after`: cost per example.
    - `verified`: what the rehearsal found, or None if it was switched off.
    - `groups`: the channel groups of the model before the cut; those that failed verification are frozen.
    - `frozen`: groups that failed verification and were left whole, with the reason.
    """

    plan: Plan
    before: Cost
    after: Cost
    verified: Verification | None
    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table of before and after, and the verdict."""
        widths = self.plan.widths.values()
        rows = [("", "before", "after", "left")]
        for name, old, new in (
            ("MACs", self.before.macs, self.after.macs),
            ("parameters", self.before.parameters, self.after.parameters),
            ("units", sum(w[0] for w in widths), sum(w[1] for w in widths)),
        ):
            rows.append((name, f"{old:,}", f"{new:,}", f"{new / max(1, old):.1%}"))
        wide = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))])
            for row in rows
        ]
        if found := self.plan.notes.get("latency"):
            shares = ", ".join(f"{name} {found[name]:.1%}" for name in ("asked", "predicted", "measured"))
            lines.append(f"time at batch {found['batch_size']}: {shares}")
        lines.append(str(self.verified) if self.verified is not None else "not verified")
        lines += [f"left whole: {name}: {reason}" for name, reason in self.frozen.items()]
        return "\n".join(line.rstrip() for line in lines)


@torch.inference_mode(mode=False)  # else new tensors could never be trained
def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion | Callable[..., Tensor] = "l1",
    keep: float | Mapping[str, float] | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | LatencyBudget | None = None,
    round_to: int | None = 1,
    ignore: Sequence[str] = (),
    optimizer: Optimizers = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    loader: Iterable[Any] | None = None,
    selection: Selection | None = None,
    scoring: Scoring | None = None,
    verify: bool = True,
    strict: bool = False,
) -> PruneResult:
    """Make a model smaller, in place, and prove it.

    Traces the channel groups, scores their units, selects those that fit the budget, rehearses the
    cut (see `filterfold.surgery.verify.rehearse`), and makes it: on the parameters, gradients, buffers,
    module attributes, optimizer state and averaged copies, as one transaction. By default this is
    Li et al. (2017): the filters of smallest L1 norm go.

    **Arguments:**

    - `model`: any module. Modes, hooks, gradients, `requires_grad` and random state are kept.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `criterion`, `loader`: see `score`. `scoring`: how the criterion is applied, with its seed.
    - `keep` | `macs` and/or `parameters`: how much may remain, see `select`.
    - `latency`: instead of those, the share of the *measured* time that may remain, on the model's device: a number,
      or a `LatencyBudget` with batch size, mode and threads; see `select_for_latency`. What was predicted and
      measured is in `plan.notes["latency"]`.
    - `round_to`, `ignore`, and for the rest `selection`: which units may stay, see `Selection`.
    - `optimizer`, `averaged`: see `apply`.
    - `verify`: whether to rehearse.
    - `strict`: whether groups whose cut turns out wrong are an error that names them. By default they are left whole
      with a warning in the log and their reasons in the result's `frozen`, and the others are cut.

    **Returns:** a `PruneResult`.

    **Raises:** `TraceError`, `SelectionError`, `SurgeryError`, or (`strict`) `VerificationError` naming the groups
    whose cut would be wrong; the model is then as before.

    ```python
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> result = prune(net, torch.zeros(1, 3, 8, 8), keep=0.5)
    >>> print(result)
                before  after   left
    MACs         8,928  4,464  50.0%
    parameters     260    132  50.8%
    units            8      4  50.0%
    the cut network equals the masked one to ...
    >>> net[0].out_channels
    4

    ```
    """
    budget = Budget(keep, macs, parameters, latency)
    selection = merged(selection or Selection(), round_to=round_to, ignore=ignore)
    scoring = scoring or Scoring()
    _check(budget, selection, scoring, verify, strict)
    inner = unwrap(model)
    check_optimizers(optimizer, inner)
    traced, before = trace_and_measure(inner, example_inputs)
    network = _Network(inner, example_inputs, traced, before)
    scores = score(
        cuttable(traced, selection.ignore)[0], inner, criterion, loader=loader, seed=scoring.seed, follow=scoring.follow
    )

    def score_again(group: ChannelGroup, plan: Plan) -> Tensor:
        return score([group], inner, criterion, seed=scoring.seed, follow=scoring.follow, without=plan)[group.name]

    def plan_for(groups: Traced) -> Plan:
        if budget.latency is not None:
            plan = network.timed_plan(groups, scores, budget.latency, selection, verify)
        elif scoring.order == "greedy" and budget.keep is not None:
            plan = select_greedily(groups, score_again, keep=budget.keep, cost=before, selection=selection)
        else:
            plan = choose(groups, scores, budget, before, selection)
        return replace(plan, notes={"criterion": _name(criterion), **plan.notes})

    def judge(plan: Plan) -> Verification:
        rewrite = network.rewrite_sizes
        found = rehearse(inner, plan, example_inputs, groups=traced, rewrite=rewrite, cache=cache, count=True)
        return found if found else network.explained(found, plan)

    cache = CutCache()
    groups, verified = traced, None
    if verify:
        groups, plan, verified = passing_plan(traced, plan_for, judge, strict=strict)
        plan = replace(plan, attributes=verified.attributes)
    else:
        plan = plan_for(traced)
    if budget.latency is not None and "asked" not in plan.notes:
        raise SelectionError("latency: no cut copy of the network could be timed; say how much may stay with macs=")
    plan, receipt = apply_with_sizes(
        plan,
        model,
        example_inputs,
        None if verify else network.rewrite_sizes,
        optimizer=optimizer,
        averaged=averaged,
        cache=cache,
    )
    frozen = {g.name: g.frozen.removeprefix(FAILED) for g in groups if g.frozen and g.frozen.startswith(FAILED)}
    if verified is not None and verified.cost is not None and not plan.attributes:
        return PruneResult(plan, before, verified.cost, verified, groups, frozen)
    try:
        after = measure(inner, example_inputs)
    except BaseException:
        receipt.rollback()
        raise
    return PruneResult(plan, before, after, verified, groups, frozen)


def _check(budget: Budget, selection: Selection, scoring: Scoring, verify: bool, strict: bool) -> None:
    """Refuse options that don't go together."""
    if strict and not verify:
        raise ConfigError("strict=True has no effect with verify=False: leave it out")
    if scoring.order == "greedy" and (budget.keep is None or selection.scope != "layer"):
        raise ConfigError("scoring: order='greedy' needs keep= and scope='layer'")
    if budget.latency is not None and selection.scope != "layer":
        raise SelectionError("scope= has no effect with latency=: leave it out")


def check_optimizers(optimizer: Optimizers, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of a network's parameters: it was made for another one."""
    own = {id(parameter) for parameter in model.parameters()}
    for entry in optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]:
        if not isinstance(entry, torch.optim.Optimizer):
            raise ConfigError(f"optimizer={type(entry).__name__}: must be a torch.optim.Optimizer, or several")
        if not any(id(parameter) in own for group in entry.param_groups for parameter in group["params"]):
            raise ConfigError(f"{type(entry).__name__} holds no parameter of this model: was it built for another one?")


@dataclass(frozen=True)
class _Network:
    """The uncut network with what was found in it."""

    model: nn.Module
    example_inputs: Any
    traced: Traced
    cost: Cost

    def rewrite_sizes(self, pruned: nn.Module, plan: Plan, inputs: Any) -> tuple[AttributeChange, ...]:
        """Put right the sizes in user code that the cut network stumbles over."""
        return rewrite_stale_sizes(pruned, plan, self.traced, inputs)

    def explained(self, failed: Verification, plan: Plan) -> Verification:
        """A failure, with the groups that a number depends on which the network computes with, if there are any."""
        if failed.masking_error is None:
            return failed  # it does not run at all
        _, receipt = apply_with_sizes(replace(plan, attributes=failed.attributes), self.model, None, None)
        try:
            return replace(failed, causes=groups_behind_numbers(self.model, plan, self.traced, self.example_inputs))
        finally:
            receipt.rollback()

    def timed_plan(
        self,
        groups: Traced,
        scores: Mapping[str, Tensor],
        latency: float | LatencyBudget,
        selection: Selection,
        verify: bool,
    ) -> Plan:
        """The plan that meets a latency budget; or one whose trial cut fails, where verification follows to say why."""
        tried: list[Plan] = []

        def cut_copy(plan: Plan) -> nn.Module:
            tried.append(plan)
            trial = copy.deepcopy(self.model)
            apply_with_sizes(plan, trial, self.example_inputs, self.rewrite_sizes)
            return trial

        try:
            return select_for_latency(
                groups,
                scores,
                latency=latency,
                model=self.model,
                example_inputs=self.example_inputs,
                cut=cut_copy,
                cost=self.cost,
                selection=selection,
            )
        except FilterfoldError as error:
            if isinstance(error, SelectionError) or not (verify and tried):
                raise
            return tried[-1]


def _name(criterion: str | Criterion | Callable[..., Tensor]) -> str:
    name = criterion if isinstance(criterion, str) else getattr(criterion, "name", None)
    return str(name or getattr(criterion, "__name__", type(criterion).__name__))
