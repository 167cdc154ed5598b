"""A network with its channel groups and their scores: what several cuts of it share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FilterfoldError, SelectionError
from ..graph import (
    Traced,
    UnrepairableError,
    groups_behind_numbers,
    rewrite_stale_sizes,
    tied,
    trace_and_measure,
    unread_sizes,
    whole_heads,
)
from ..graph.labels import Tie
from ..plan import AttributeChange, ChannelGroup, Plan
from ..profiling.macs import Cost, measure
from ..surgery.apply import apply_with_sizes
from ..surgery.cut_cache import CutCache
from ..surgery.verdict import Verification, listed
from ..surgery.verify import rehearse
from ..utils.arguments import check_fields
from ..utils.modules import unwrap
from .budgets import Budget, LatencyBudget, Selection, choose, cuttable, select_for_latency, select_greedily
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
        check_fields(self)
        if self.order not in ("independent", "greedy"):
            raise ConfigError(f"scoring: order={self.order!r} must be 'independent' or 'greedy'")
        if self.follow not in (None, "shortcut"):
            raise ConfigError(f"scoring: follow={self.follow!r} must be 'shortcut' or None")


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What `prune` did.

    **Arguments:**

    - `plan`: the cut that was made, replayable with `apply` on a copy of the original. `plan.notes["unsure"]` lists
      attributes that hold the old size of something that was cut, or of something else: forward does not read them.
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
        if unsure := self.plan.notes.get("unsure"):
            lines.append(f"may be out of date, since forward does not read them: {listed(unsure)}")
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, slots=True)
class Rules:
    """How cuts are chosen and judged, whatever the budget: arguments of `prune`."""

    criterion: str | Criterion | Callable[..., Tensor]
    selection: Selection
    scoring: Scoring
    verify: bool
    strict: bool

    def check(self, budget: Budget) -> None:
        """Refuse options that don't go together."""
        if self.strict and not self.verify:
            raise ConfigError("strict=True has no effect with verify=False: leave it out")
        if self.scoring.order == "greedy" and (budget.keep is None or self.selection.scope != "layer"):
            raise ConfigError("scoring: order='greedy' needs keep= and scope='layer'")
        if budget.latency is not None and self.selection.scope != "layer":
            raise SelectionError("scope= has no effect with latency=: leave it out")

    def score(self, groups: Iterable[ChannelGroup], model: nn.Module, **data: Any) -> dict[str, Tensor]:
        """`score`, by these rules."""
        return score(groups, model, self.criterion, seed=self.scoring.seed, follow=self.scoring.follow, **data)

    @property
    def name(self) -> str:
        """The criterion's name."""
        name = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "name", None)
        return str(name or getattr(self.criterion, "__name__", type(self.criterion).__name__))


@dataclass(frozen=True, slots=True)
class Planned:
    """A cut that was chosen and rehearsed, but not made; in `groups` those that failed are frozen."""

    groups: Traced
    plan: Plan
    verified: Verification | None


@dataclass(frozen=True, slots=True)
class Scored:
    """An uncut network, how it is called, its groups, its cost, and the scores of its units by some rules.

    `ties`: labels that would have to go together for sizes that failed so far.
    """

    model: nn.Module
    example_inputs: Any
    rules: Rules
    traced: Traced
    cost: Cost
    scores: Mapping[str, Tensor]
    ties: dict[tuple[int, int], Tie] = field(default_factory=dict)

    def planned(self, budget: Budget, cache: CutCache | None = None) -> Planned:
        """The cut that a budget asks for, rehearsed unless the rules say otherwise; `cache` keeps what it cut."""
        if not self.rules.verify:
            return Planned(self.traced, self._plan(self.traced, budget), None)

        def rehearsed(plan: Plan) -> Verification:
            how: dict[str, Any] = {"groups": self.traced, "rewrite": self._rewrite_sizes, "cache": cache, "count": True}
            return rehearse(self.model, plan, self.example_inputs, **how)

        def judge(plan: Plan) -> Verification:
            found = rehearsed(plan)
            if not found and plan.attributes:  # which may mean something else
                plan = replace(plan, attributes=())
                found = rehearsed(plan)
            return self._explained(found, plan)

        groups, plan, verified = passing_plan(
            self.traced, lambda groups: self._plan(groups, budget), judge, strict=self.rules.strict
        )
        plan = replace(plan, attributes=verified.attributes)
        if budget.latency is not None and "asked" not in plan.notes:
            raise SelectionError("latency: no cut copy of the network could be timed; say how much may stay with macs=")
        return Planned(groups, plan, verified)

    def alternatives(self, planned: Planned, loader: Iterable[Any] | None) -> Iterator[Scored]:
        """The same network, scored anew by groups of which less may fail.

        First with labels tied whose sizes the model's code takes from one another, then by whole heads of those
        attentions that can't be cut within their heads. None where the data to score with is used up.
        """
        failed = [group.name for group in planned.groups if group.frozen and group.frozen.startswith(FAILED)]
        if not failed or isinstance(loader, Iterator):
            return
        if self.ties:
            yield self._anew(tied(self.model, self.example_inputs, self.traced, self.ties.values()), loader)
        traced = whole_heads(self.model, self.example_inputs, self.traced, failed)
        if traced is not None:
            yield self._anew(traced, loader)

    def _anew(self, traced: Traced, loader: Iterable[Any] | None) -> Scored:
        groups = cuttable(traced, self.rules.selection.ignore)[0]
        return replace(self, traced=traced, scores=self.rules.score(groups, self.model, loader=loader), ties={})

    def cut(
        self,
        planned: Planned,
        model: nn.Module,
        *,
        optimizer: Optimizers = None,
        averaged: nn.Module | Sequence[nn.Module] = (),
        cache: CutCache | None = None,
    ) -> PruneResult:
        """Make a planned cut in place: on the uncut network itself, in whatever wrappers, or on a copy."""
        plan, receipt = apply_with_sizes(
            planned.plan,
            model,
            self.example_inputs,
            self._rewrite_sizes if planned.verified is None else None,
            optimizer=optimizer,
            averaged=averaged,
            cache=cache,
        )
        frozen = {
            group.name: group.frozen.removeprefix(FAILED)
            for group in planned.groups
            if group.frozen and group.frozen.startswith(FAILED)
        }
        after = planned.verified.cost if planned.verified is not None else None
        if after is None:
            try:
                after = measure(unwrap(model), self.example_inputs)
            except BaseException:
                receipt.rollback()
                raise
        return PruneResult(plan, self.cost, after, planned.verified, planned.groups, frozen)

    def _plan(self, groups: Traced, budget: Budget) -> Plan:
        """The plan for a budget."""
        rules, selection = self.rules, self.rules.selection
        if budget.latency is not None:
            plan = self._timed_plan(groups, budget.latency)
        elif rules.scoring.order == "greedy" and budget.keep is not None:
            plan = select_greedily(groups, self._score_again, keep=budget.keep, cost=self.cost, selection=selection)
        else:
            plan = choose(groups, self.scores, budget, self.cost, selection)
        attributes, unsure = unread_sizes(self.model, plan, self.traced)
        notes = {"criterion": rules.name, **plan.notes, **({"unsure": list(unsure)} if unsure else {})}
        return replace(plan, attributes=attributes, notes=notes)

    def _score_again(self, group: ChannelGroup, plan: Plan) -> Tensor:
        return self.rules.score([group], self.model, without=plan)[group.name]

    def _rewrite_sizes(
        self, pruned: nn.Module, plan: Plan, inputs: Any, *, among: Sequence[AttributeChange] | None = None
    ) -> tuple[AttributeChange, ...]:
        """Put right the sizes in user code that the cut network stumbles over."""
        try:
            return rewrite_stale_sizes(pruned, plan, self.traced, inputs, among=among)
        except UnrepairableError as error:
            if among is None:
                self.ties.update({(int(first[0]), int(second[0])): (first, second) for first, second in error.ties})
            raise

    def _explained(self, found: Verification, plan: Plan) -> Verification:
        """A verdict, with the groups that a number depends on which the network computes with, if there are any.

        A comparison that passed says nothing of such numbers where the units are not mask-exact, and little where a
        softmax of small logits hides them.
        """
        exact = {group.name for group in self.traced if group.exact}
        if found.masking_error is None and not found:
            return found  # it does not run at all
        if found and all(cut.group in exact for cut in plan.cuts if cut.changes):
            return found
        _, receipt = apply_with_sizes(replace(plan, attributes=found.attributes), self.model, None, None)
        try:
            causes = groups_behind_numbers(self.model, plan, self.traced, self.example_inputs)
        finally:
            receipt.rollback()
        if not found:
            return replace(found, causes=causes)
        causes = {name: why for name, why in causes.items() if name not in exact}
        return replace(found, ok=False, causes=causes, message=next(iter(causes.values()))) if causes else found

    def _timed_plan(self, groups: Traced, latency: float | LatencyBudget) -> Plan:
        """The plan that meets a latency budget; or one whose trial cut fails, where verification follows to say why."""
        tried: list[Plan] = []

        def cut_copy(plan: Plan) -> nn.Module:
            tried.append(plan)
            trial = copy.deepcopy(self.model)
            apply_with_sizes(plan, trial, self.example_inputs, self._rewrite_sizes)
            return trial

        try:
            return select_for_latency(
                groups,
                self.scores,
                latency=latency,
                model=self.model,
                example_inputs=self.example_inputs,
                cut=cut_copy,
                cost=self.cost,
                selection=self.rules.selection,
            )
        except FilterfoldError as error:
            if isinstance(error, SelectionError) or not (self.rules.verify and tried):
                raise
            return tried[-1]


def scored(model: nn.Module, example_inputs: Any, rules: Rules, loader: Iterable[Any] | None) -> Scored:
    """Trace an unwrapped network and score its units."""
    traced, cost = trace_and_measure(model, example_inputs)
    scores = rules.score(cuttable(traced, rules.selection.ignore)[0], model, loader=loader)
    return Scored(model, example_inputs, rules, traced, cost, scores)
