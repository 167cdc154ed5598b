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
from .patterns import check_budget, check_options, matching
from .ranking import RankedGroup, rank
from .solver import NORMS, Normalize, Scope, count, search


def select(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    *,
    keep: float | Mapping[str, float] | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    cost: Cost | None = None,
    scope: Scope = "layer",
    round_to: int = 1,
    min_keep: int = 1,
    ignore: Sequence[str] = (),
    normalize: Normalize = "mean",
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
    - `scope`: `"layer"` ranks within each group; `"global"` ranks the units of all groups together,
      after dividing each group's scores by `normalize`.
    - `round_to`: a group keeps a multiple of this many units, the nearest to what it would keep
      (the smaller one of two equally near), at least one multiple; or else all its units. So a
      group narrower than `round_to` stays whole. What was rounded is noted.
    - `min_keep`: every group keeps at least so many units (all, if it has no more).
    - `ignore`: names or glob patterns of layers whose channels stay whole.
    - `normalize`: `"mean"`, `"max"` or `"l2"` of the absolute scores of the group, or `"none"`.

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
    groups = tuple(groups)
    asked = check_budget(keep, macs, parameters, cost, scope)
    check_options(scope, round_to, min_keep, normalize, NORMS)
    free, ignored = cuttable(groups, ignore)
    ranked = [rank(group, scores, round_to, min_keep) for group in free]
    if not ranked:
        refuse_nothing(groups, ranked, (), asked)
    adjusted = {}
    if keep is not None and scope == "layer":
        shares = _shares(groups, keep)
        wanted = [count(group.size, shares[group.name]) for group in free]
        counts = [room.nearest(number) for room, number in zip(ranked, wanted, strict=True)]
        adjusted = {r.group.name: [w, n] for r, w, n in zip(ranked, wanted, counts, strict=True) if w != n}
    else:
        limits = {"units" if name == "keep" else name: share for name, share in asked.items()}
        counts = search(ranked, limits, cost, scope, normalize)
    refuse_nothing(groups, ranked, counts, asked)
    cuts = tuple(room.cut(number) for room, number in zip(ranked, counts, strict=True))
    notes: dict[str, Any] = {"scope": scope, "asked": asked, "achieved": achieved_shares(cuts, cost)}
    frozen = {group.name: group.frozen for group in groups if group.frozen is not None}
    extras = {"adjusted": adjusted, "frozen": frozen, "ignored": ignored}
    options = {"round_to": round_to, "min_keep": min_keep} if (round_to, min_keep) != (1, 1) else {}
    return Plan(cuts, notes=notes | options | {name: value for name, value in extras.items() if value})


def select_greedily(
    groups: Iterable[ChannelGroup],
    score: Callable[[ChannelGroup, Plan], Tensor],
    *,
    keep: float | Mapping[str, float],
    cost: Cost | None = None,
    round_to: int = 1,
    min_keep: int = 1,
    ignore: Sequence[str] = (),
) -> Plan:
    """Choose the units to keep group by group, each scored with the earlier choices in view.

    The greedy strategy of Li et al. (2017), section 3.2 and Figure 4: the kernels of channels that
    were already dropped don't count for a filter.

    **Arguments:**

    - `groups`: in the order in which they are to be pruned, as `filterfold.trace` gives them.
    - `score`: `score(group, plan)` → scores of shape `(size,)`, given the plan for the groups before,
      such as `lambda group, plan: ff.score([group], model, without=plan)[group.name]`.
    - the others: as in `select`, with a ratio per layer.

    **Returns:** the `Plan`, with the notes of `select` and `"scoring": "greedy"`.

    **Raises:** `SelectionError` as `select` does.

    ```python
    >>> import torch
    >>> group = ChannelGroup("conv", 4, (), (), True, None, (0,) * 4, (0,) * 4)
    >>> select_greedily([group], lambda group, plan: torch.arange(group.size), keep=0.5).widths
    {'conv': (4, 2)}

    ```
    """
    groups = tuple(groups)
    cuts: list[Cut] = []
    scores: dict[str, Tensor] = {}
    check_budget(keep, None, None, cost, "layer")
    shares = _shares(groups, keep)
    for group in cuttable(groups, ignore)[0]:
        scores[group.name] = score(group, Plan(tuple(cuts)))
        room = rank(group, scores, round_to, min_keep)
        cuts.append(room.cut(room.nearest(count(group.size, shares[group.name]))))
    plan = select(groups, scores, keep=keep, cost=cost, round_to=round_to, min_keep=min_keep, ignore=ignore)
    return replace(plan, notes={**plan.notes, "scoring": "greedy"})


def cuttable(groups: Sequence[ChannelGroup], ignore: Sequence[str]) -> tuple[list[ChannelGroup], list[str]]:
    """The groups that may be cut, and the names of those that are ignored."""
    if isinstance(ignore, str):
        raise SelectionError(f"ignore={ignore!r}: must be a list of names; write [{ignore!r}]")
    ignored = {group.name for pattern in ignore for group in matching(pattern, groups, "ignore")}
    return [group for group in groups if group.frozen is None and group.name not in ignored], sorted(ignored)


def _shares(groups: Sequence[ChannelGroup], keep: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(keep, Mapping):
        return {group.name: keep for group in groups}
    shares = {group.name: 1.0 for group in groups}
    for pattern, share in keep.items():
        shares |= {group.name: share for group in matching(pattern, groups, "keep")}
    return shares


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
        why = "min_keep, round_to or the small widths leave every group whole"
    raise SelectionError(f"nothing would be cut: {why}")
