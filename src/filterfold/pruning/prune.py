"""The one verb: trace, score, select, rehearse, cut."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FilterfoldError, PlanError, SelectionError, SurgeryError, VerificationError
from ..graph import Traced, rewrite_stale_sizes, trace_and_measure
from ..plan import AttributeChange, ChannelGroup, Cut, Plan
from ..profiling.macs import Cost, measure
from ..surgery.apply import Rewrite, apply_with_sizes
from ..surgery.cut_cache import CutCache
from ..surgery.verdict import Verification
from ..surgery.verify import rehearse
from ..utils.modules import unwrap
from .budgets import LatencyBudget, cuttable, select, select_for_latency, select_greedily
from .criteria import Criterion, score

_LOG = logging.getLogger("filterfold.prune")


_ROUNDS = 4
"""How often groups that failed may be frozen and the rest chosen anew."""


Judge = Callable[[Plan], Verification]


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
    scope: Literal["layer", "global"] = "layer",
    round_to: int = 1,
    min_keep: int = 1,
    ignore: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    loader: Iterable[Any] | None = None,
    verify: bool = True,
    seed: int = 0,
    follow: Literal["shortcut"] | None = None,
    scoring: Literal["independent", "greedy"] = "independent",
    on_failure: Literal["raise", "freeze"] = "raise",
) -> PruneResult:
    """Make a model smaller, in place, and prove it.

    Traces the channel groups, scores their units, selects those that fit the budget, rehearses the
    cut (see `filterfold.surgery.verify.rehearse`), and makes it: on the parameters, gradients, buffers,
    module attributes, optimizer state and averaged copies, as one transaction. By default this is
    Li et al. (2017): the filters of smallest L1 norm go.

    **Arguments:**

    - `model`: any module. Modes, hooks, gradients, `requires_grad` and random state are kept.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `criterion`, `loader`, `seed`, `follow`: see `score`.
    - `scoring`: `"independent"`, or `"greedy"`: the kernels of channels dropped further up don't count for a filter
      (see `select_greedily`; weight criteria and `keep` only).
    - `keep`, `macs`, `parameters`, `scope`, `round_to`, `min_keep`, `ignore`: see `select`.
    - `latency`: instead of those, the share of the *measured* time that may remain, on the model's device: a number,
      or a `LatencyBudget` with batch size, mode and threads; see `select_for_latency`. What was predicted and
      measured is in `plan.notes["latency"]`.
    - `optimizer`, `averaged`: see `apply`.
    - `verify`: whether to rehearse.
    - `on_failure`: what to do with groups whose cut turns out wrong: `"raise"` an error that names
      them, or `"freeze"` them with a warning in the log and cut the others.

    **Returns:** a `PruneResult`.

    **Raises:** `TraceError`, `SelectionError`, `SurgeryError`, or `VerificationError` naming the groups whose cut
    would be wrong; the model is then as before.

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
    _check(on_failure, scoring, scope, keep=keep, macs=macs, parameters=parameters, latency=latency)
    inner = unwrap(model)
    traced, before = trace_and_measure(inner, example_inputs)
    scores = score(cuttable(traced, ignore)[0], inner, criterion, loader=loader, seed=seed, follow=follow)
    options: dict[str, Any] = {"round_to": round_to, "min_keep": min_keep, "ignore": ignore, "cost": before}

    def again(group: ChannelGroup, plan: Plan) -> Tensor:
        return score([group], inner, criterion, seed=seed, follow=follow, without=plan)[group.name]

    def choose(groups: Traced) -> Plan:
        if latency is not None:
            plan = _timed(inner, example_inputs, rewrite, groups, scores, latency, verify, options)
        elif scoring == "greedy" and keep is not None:
            plan = select_greedily(groups, again, keep=keep, **options)
        else:
            plan = select(groups, scores, keep=keep, macs=macs, parameters=parameters, scope=scope, **options)
        return replace(plan, notes={"criterion": _name(criterion), **plan.notes})

    def rewrite(pruned: nn.Module, plan: Plan, inputs: Any) -> tuple[AttributeChange, ...]:
        return rewrite_stale_sizes(pruned, plan, traced, inputs)

    def judge(plan: Plan) -> Verification:
        return rehearse(inner, plan, example_inputs, groups=traced, rewrite=rewrite, cache=cache, count=True)

    cache = CutCache()
    groups, verified, frozen = traced, None, dict[str, str]()
    if verify:
        groups, plan, verified = _verified(traced, choose, judge, frozen, on_failure)
        plan = replace(plan, attributes=verified.attributes)
    else:
        plan = choose(traced)
    if latency is not None and "asked" not in plan.notes:
        raise SelectionError("latency: no cut copy of the network could be timed; say how much may stay with macs=")
    plan, receipt = apply_with_sizes(
        plan,
        model,
        example_inputs,
        None if verify else rewrite,
        optimizer=optimizer,
        averaged=averaged,
        cache=cache,
    )
    if verified is not None and verified.cost is not None and not plan.attributes:
        return PruneResult(plan, before, verified.cost, verified, groups, frozen)
    try:
        after = measure(inner, example_inputs)
    except BaseException:
        receipt.rollback()
        raise
    return PruneResult(plan, before, after, verified, groups, frozen)


def _check(on_failure: str, scoring: str, scope: str, *, latency: Any, **budgets: Any) -> None:
    """Refuse options that don't exist or don't go together."""
    if on_failure not in ("raise", "freeze"):
        raise ConfigError(f"on_failure={on_failure!r}: must be 'raise' or 'freeze'")
    greedy = scoring == "greedy"
    if scoring not in ("independent", "greedy") or (greedy and (budgets["keep"] is None or scope != "layer")):
        raise ConfigError(f"scoring={scoring!r}: must be 'independent', or 'greedy' together with keep= per layer")
    if latency is not None and any(budget is not None for budget in budgets.values()):
        raise SelectionError("latency= can't be combined with keep=, macs= or parameters=: give one or the other")


def _timed(
    model: nn.Module,
    example_inputs: Any,
    rewrite: Rewrite,
    groups: Traced,
    scores: Mapping[str, Tensor],
    latency: float | LatencyBudget,
    verify: bool,
    options: Mapping[str, Any],
) -> Plan:
    """The plan that meets a latency budget; or one whose trial cut fails, where verification follows to say why."""
    tried: list[Plan] = []

    def cut(plan: Plan) -> nn.Module:
        tried.append(plan)
        trial = copy.deepcopy(model)
        apply_with_sizes(plan, trial, example_inputs, rewrite)
        return trial

    where = {"model": model, "example_inputs": example_inputs, "cut": cut}
    try:
        return select_for_latency(groups, scores, latency=latency, **where, **options)
    except FilterfoldError as error:
        if isinstance(error, SelectionError) or not (verify and tried):
            raise
        return tried[-1]


def _verified(
    traced: Traced,
    choose: Callable[[Traced], Plan],
    judge: Judge,
    frozen: dict[str, str],
    on_failure: str,
) -> tuple[Traced, Plan, Verification]:
    """The plan that passes, after freezing what fails, if that is asked for."""
    groups = traced
    for _ in range(_ROUNDS):
        plan = choose(groups)
        verification = _tried(judge, plan)
        if verification.ok:
            return groups, plan, verification
        wrong = culprits(plan, judge)
        names = ", ".join(wrong) or "the groups together"
        message = next(iter(wrong.values()), verification.message)
        if on_failure == "raise" or not wrong:
            raise VerificationError(
                f"cutting {names} would be wrong and was not done: {message}; ignore=[...] skips it"
            )
        for name, reason in wrong.items():
            _LOG.warning("group %s fails verification and is left whole: %s", name, reason)
        frozen |= wrong
        kept = (
            dataclasses.replace(g, frozen=f"failed verification: {frozen[g.name]}") if g.name in frozen else g
            for g in traced
        )
        groups = Traced(kept, traced.sizes, traced.unmet)
    raise VerificationError(f"groups keep failing verification ({', '.join(frozen)}): {verification.message}")


def culprits(plan: Plan, judge: Judge) -> dict[str, str]:
    """The groups because of which a plan fails, with what their cut does.

    Where the failure names its suspects those are taken; otherwise they are found by halving.

    **Arguments:**

    - `plan`: a plan that fails.
    - `judge`: tries a plan.

    **Returns:** group name → message; what is left of the plan without them passes.
    """
    wrong: dict[str, str] = {}

    def settle(cuts: list[Cut]) -> list[Cut]:
        """The cuts of these that pass together."""
        verification = _tried(judge, Plan(tuple(cuts)))
        if verification.ok or not cuts:
            return cuts
        suspects = [cut for cut in cuts if cut.group in verification.suspects]
        if not suspects:
            return add([], cuts, verification)
        rest = settle([cut for cut in cuts if cut not in suspects])
        return add(rest, suspects, verification if len(suspects) == 1 else None)

    def add(accepted: list[Cut], candidates: list[Cut], failed: Verification | None) -> list[Cut]:
        """The accepted cuts and the candidates that pass with them; `failed`: the outcome for all, if known."""
        verification = failed or _tried(judge, Plan((*accepted, *candidates)))
        if verification.ok:
            return accepted + candidates
        if len(candidates) == 1:
            wrong[candidates[0].group] = verification.message
            return accepted
        half = len(candidates) // 2
        return add(add(accepted, candidates[:half], None), candidates[half:], None)

    settle([cut for cut in plan.cuts if cut.changes])
    return wrong


def _tried(judge: Judge, plan: Plan) -> Verification:
    try:
        return judge(plan)
    except (SurgeryError, PlanError) as error:
        return Verification(False, None, None, (), str(error))


def _name(criterion: str | Criterion | Callable[..., Tensor]) -> str:
    name = criterion if isinstance(criterion, str) else getattr(criterion, "name", None)
    return str(name or getattr(criterion, "__name__", type(criterion).__name__))
