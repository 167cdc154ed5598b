"""Scores and a budget → a plan that drops units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import SelectionError
from ...plan import ChannelGroup, Cut, Plan
from ...profiling.macs import Cost
from ...profiling.predict import predict
from ...utils.arguments import typed
from .options import Budget, Selection
from .patterns import by_group, cuttable
from .prices import SizePrices
from .ranking import RankedGroup, count, multiple, rank
from .solver import Normalize, Scope, search


@typed
def select(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    *,
    keep: float | Mapping[str, float] | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    cost: Cost | None = None,
    scope: Scope = "layer",
    round_to: int | None = 1,
    min_keep: float = 1,
    ignore: Sequence[str] = (),
    normalize: Normalize = "mean",
    max_cut: float = 1.0,
) -> Plan:
    """Choose the units to keep: those with the highest scores, within a budget.

    Exactly one kind of budget is given: `keep`, or `macs` and/or `parameters`. Of equal scores the
    unit with the lower index is kept, so counts are exact under ties.

    **Arguments:**

    - `groups`: what `filterfold.trace` found. Frozen groups are left whole and noted.
    - `scores`: group name → scores of shape `(size,)`, higher = keep.
    - `keep`: share of units kept, in (0, 1]. A group of C units keeps `int(C * keep)` of them (the
      count of Li et al. 2017, with float noise removed), at least `min_keep`. A mapping gives
      shares by group name or glob pattern; the last pattern that matches counts; groups that none
      matches stay whole. With `scope="global"` the share is of all units together.
    - `macs`, `parameters`: share of the original that may remain, in (0, 1], as predicted from
      `cost`. Per layer: the largest common keep ratio that fits, after which single groups get
      another unit (or step of `round_to`) in order as long as that fits. Global: the longest
      prefix of the ranking that fits, then those of the units behind it that still fit. What
      remains is never more than was asked.
    - `cost`: `filterfold.profiling.macs.measure` of the model; needed for `macs` and `parameters`, and with
      `keep` it only adds the predicted shares to the notes.
    - `scope`, `round_to`, `min_keep`, `ignore`, `normalize`, `max_cut`: see `Selection`. What was rounded is noted.

    Units of different `classes` are ranked apart and keep the group's share each (Webster's method),
    at least one unit; every one of the `blocks` keeps the same number.

    **Returns:** a `Plan` with one cut per group that is neither frozen nor ignored; `plan.notes` has
    `asked`, `achieved` (shares), and where they apply `adjusted` (group → [asked, kept] units),
    `frozen` (group → reason) and `ignored`.

    **Raises:** `SelectionError` if the budget can't be met (with the smallest share that can), makes
    no sense, would change nothing, or a pattern matches no layer.

    ```python
    >>> import torch
    >>> from filterfold.plan import ChannelGroup
    >>> from filterfold.plan import Slice
    >>> part = Slice("conv.weight", 0, (0, 1, 2, 3), "filter")
    >>> group = ChannelGroup("conv", 4, (part,), (), True, None, (0,) * 4, (0,) * 4)
    >>> select([group], {"conv": torch.tensor([3.0, 1.0, 1.0, 2.0])}, keep=0.75).cuts[0].assignment
    (0, 1, -1, 2)

    ```
    """
    selection = Selection(scope, round_to, min_keep, ignore, normalize, max_cut)
    return choose(groups, scores, Budget(keep, macs, parameters), cost, selection)


def choose(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    budget: Budget,
    cost: Cost | None,
    selection: Selection,
) -> Plan:
    """`select`, with its options as objects."""
    groups = tuple(groups)
    if budget.keep is None and cost is None:
        raise SelectionError("macs= and parameters= need cost=filterfold.profiling.macs.measure(model, example_inputs)")
    if isinstance(budget.keep, Mapping) and selection.scope == "global":
        raise SelectionError('keep= for single layers needs scope="layer"')
    asked = budget.asked()
    free, ignored = cuttable(groups, selection.ignore)
    wanted = asked_counts(groups, free, budget.keep) if selection.scope == "layer" and budget.keep is not None else None
    ranked = [ranked_group(group, scores, selection) for group in free]
    adjusted = {}
    if not ranked:
        counts = []
    elif wanted is not None:
        counts = [entry.nearest(number) for entry, number in zip(ranked, wanted, strict=True)]
        adjusted = {r.group.name: [w, n] for r, w, n in zip(ranked, wanted, counts, strict=True) if w != n}
    else:
        limits = {"units" if name == "keep" else name: share for name, share in asked.items()}
        prices = SizePrices(ranked, None if "units" in limits else cost)
        counts = search(ranked, limits, prices, selection.scope, selection.normalize)
    refuse_nothing(groups, ranked, counts, asked)
    cuts = tuple(entry.cut(number) for entry, number in zip(ranked, counts, strict=True))
    notes: dict[str, Any] = {"scope": selection.scope, "asked": asked, "achieved": achieved_shares(cuts, cost)}
    if (selection.round_to, selection.min_keep) != (1, 1):
        notes |= {"round_to": selection.round_to, "min_keep": selection.min_keep}
    if selection.max_cut != 1:
        notes["max_cut"] = selection.max_cut
    return Plan(cuts, notes=notes | left_out(groups, ignored, adjusted))


def select_greedily(
    groups: Iterable[ChannelGroup],
    score: Callable[[ChannelGroup, Plan], Tensor],
    *,
    keep: float | Mapping[str, float],
    cost: Cost | None = None,
    selection: Selection | None = None,
) -> Plan:
    """Choose the units to keep group by group, each scored with the earlier choices in view.

    The greedy strategy of Li et al. (2017), section 3.2 and Figure 4: the kernels of channels that
    were already dropped don't count for a filter.

    **Arguments:**

    - `groups`: in the order in which they are to be pruned, as `filterfold.trace` gives them.
    - `score`: `score(group, plan)` → scores of shape `(size,)`, given the plan for the groups before,
      such as `lambda group, plan: ff.score([group], model, without=plan)[group.name]`.
    - `keep`, `cost`: as in `select`. `selection`: which units may stay, per layer.

    **Returns:** the `Plan`, with the notes of `select` and `"scoring": "greedy"`.

    **Raises:** `SelectionError` as `select` does.

    ```python
    >>> import torch
    >>> group = ChannelGroup("conv", 4, (), (), True, None, (0,) * 4, (0,) * 4)
    >>> select_greedily([group], lambda group, plan: torch.arange(group.size), keep=0.5).widths
    {'conv': (4, 2)}

    ```
    """
    groups, selection, budget = tuple(groups), selection or Selection(), Budget(keep)
    cuts: list[Cut] = []
    scores: dict[str, Tensor] = {}
    free = cuttable(groups, selection.ignore)[0]
    for group, wanted in zip(free, asked_counts(groups, free, keep), strict=True):
        scores[group.name] = score(group, Plan(tuple(cuts)))
        ranked = ranked_group(group, scores, selection)
        cuts.append(ranked.cut(ranked.nearest(wanted)))
    plan = choose(groups, scores, budget, cost, selection)
    return replace(plan, notes={**plan.notes, "scoring": "greedy"})


def ranked_group(group: ChannelGroup, scores: Mapping[str, Tensor], selection: Selection) -> RankedGroup:
    """A group with the numbers of units that a selection lets it keep."""
    return rank(group, scores, multiple(selection.round_to, group.size), selection.least(group.size))


def asked_counts(
    groups: Sequence[ChannelGroup], free: Sequence[ChannelGroup], keep: float | Mapping[str, float]
) -> list[int]:
    """Units that `keep` asks for, for each of the groups that may be cut; patterns may name others too."""
    shares = by_group(groups, "keep", keep)
    return [count(group.size, shares.get(group.name, 1.0)) for group in free]


def left_out(
    groups: Sequence[ChannelGroup], ignored: Sequence[str], adjusted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Notes on groups that did not get what was asked for; none where there is nothing to note."""
    frozen = {group.name: group.frozen for group in groups if group.frozen is not None}
    notes = {"adjusted": adjusted, "frozen": frozen, "ignored": ignored}
    return {name: value for name, value in notes.items() if value}


def achieved_shares(cuts: Sequence[Cut], cost: Cost | None) -> dict[str, float]:
    """Shares of units, and where the cost is known of MACs and parameters, that are left, for the notes."""
    units = sum(cut.size for cut in cuts)
    achieved = {"units": sum(cut.new_size for cut in cuts) / units} if units else {}
    if cost is not None:
        after = predict(Plan(tuple(cuts)), cost)
        achieved |= {"macs": after.macs / max(1, cost.macs), "parameters": after.parameters / max(1, cost.parameters)}
    return achieved


def refuse_nothing(
    groups: Sequence[ChannelGroup], ranked: Sequence[RankedGroup], counts: Sequence[int], asked: Mapping[str, Any]
) -> None:
    """Refuse to do nothing where something was asked."""
    shares = [v for value in asked.values() for v in (value.values() if isinstance(value, dict) else (value,))]
    if all(share == 1 for share in shares) or any(n < r.group.size for r, n in zip(ranked, counts, strict=True)):
        return
    frozen = next((f"{group.name}: {group.frozen}" for group in groups if group.frozen is not None), None)
    if not ranked:
        why = f"every channel group is frozen or ignored ({frozen})" if frozen else "there is no channel group to cut"
    else:
        why = "min_keep, max_cut, round_to or the small widths leave every group whole"
    raise SelectionError(f"nothing would be cut: {why}")
