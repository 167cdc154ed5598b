"""How many units every group is to have, at each milestone on the way from its full width to the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..plan import ChannelGroup
from ..profiling.macs import Cost
from ..pruning.budgets.patterns import by_group, cuttable
from ..pruning.budgets.prices import SizePrices
from ..pruning.budgets.ranking import RankedGroup, count, multiple, parts, unranked
from ..pruning.budgets.solver import LossCurve, descend, out_of_reach
from .clustering import merging_inertias
from .folding import FILTER_ROLES, Features, features
from .options import Target

_LEAST = 12
"""No group gets narrower than this part of its first width: where all else is dear, one layer would pay for all."""


_STEPS = 48
"""Widths tried for each group from its full one down to none, as far as multiples of `round_to` allow."""


class TargetWidths:
    """The widths that the groups of one network are to have.

    **Arguments:**

    - `target`: what is to remain.
    - `groups`: those of the network before its first cut.
    - `cost`: of that network.

    **Attributes:** `full` (group → units before the first cut), `macs` (of the network before it), `chosen` (group →
    units at the next milestone, where a budget of multiply-accumulates decides).

    **Raises:** `SelectionError` if a pattern matches no layer, or the narrowest network is over the budget.
    """

    def __init__(self, target: Target, groups: Sequence[ChannelGroup], cost: Cost) -> None:
        self.target, self.macs = target, cost.macs
        self.full = {group.name: group.size for group in self._foldable(groups)}
        self.chosen: dict[str, int] = {}
        self._counts = by_group(groups, "clusters", target.clusters) if target.clusters is not None else {}
        self._shares = by_group(groups, "keep", target.keep) if target.keep is not None else {}
        if target.macs is not None:
            ranked = [self.ranked(group) for group in self.active(groups)]
            least = SizePrices(ranked, cost).amounts([self.tried(entry)[-1] for entry in ranked])["macs"]
            if least > target.macs * cost.macs:
                raise out_of_reach({"macs": target.macs}, {"macs": least / max(1, cost.macs)})

    def active(self, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
        """Those of these groups that may be folded: not frozen, not ignored, and with filters of their own."""
        return tuple(group for group in groups if group.name in self.full and group.frozen is None and group.size > 1)

    def _foldable(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        free, _ = cuttable(groups, self.target.ignore)
        return [g for g in free if g.size > 1 and any(piece.role in FILTER_ROLES for piece in g.producers)]

    def ranked(self, group: ChannelGroup) -> RankedGroup:
        """A group with the numbers of units that it may keep."""
        return unranked(group, self.multiple(group), self.target.min_keep)

    def multiple(self, group: ChannelGroup) -> int:
        """What the width of a group must be a multiple of."""
        exact = self.target.round_to is None and self.target.clusters is not None
        return 1 if exact else multiple(self.target.round_to, self.full[group.name])

    def tried(self, ranked: RankedGroup) -> list[int]:
        """The widths of a group to look at for a budget, from its present one down."""
        size, unit = ranked.group.size, self.multiple(ranked.group)
        step = max(-(-size // _STEPS // unit), 1) * unit
        least = max(self.full[ranked.group.name] // _LEAST // unit, 1) * unit
        wanted = {ranked.nearest(width) for width in (*range((size - 1) // step * step, least - 1, -step), least)}
        return [size, *sorted((width for width in wanted if width < size), reverse=True)]

    def width(self, group: ChannelGroup, share: float) -> int:
        """Units that a group is to have when it is `share` of the way from its full width to the target."""
        if group.name in self.chosen:
            return self.chosen[group.name]
        full = self.full[group.name]
        end = min(self._counts.get(group.name, full), full)
        if group.name in self._shares:
            end = max(count(full, self._shares[group.name]), 1)
        return self.ranked(group).nearest(int(round(full + (end - full) * share, 9)))

    def shared_out(self, group: ChannelGroup, share: float) -> tuple[int, ...] | None:
        """The same for each of the group's parts, or None if nothing is to be removed."""
        width = self.width(group, share)
        return None if width >= group.size else self.ranked(group).shared_out(width)

    def choose(
        self, groups: Sequence[ChannelGroup], share: float, tensors: Mapping[str, Tensor], cost: Cost, kind: Features
    ) -> None:
        """Choose the widths for a share of the way to the budget of multiply-accumulates, if there is one.

        Narrows, step by step, the group that pays least in clustering loss for each multiply-accumulate saved.

        **Arguments:** `groups`, `tensors`, `cost`: of the network as it is. `kind`: what units are compared by.
        """
        if self.target.macs is None:
            return
        ranked = [self.ranked(group) for group in groups]
        curves = [clustering_curve(entry, self.tried(entry), tensors, kind) for entry in ranked]
        prices, limit = SizePrices(ranked, cost), self.limit(share)
        for counts in descend(curves, prices):
            macs = prices.amounts(counts)["macs"]
            if macs <= limit:
                self.chosen = {group.name: width for group, width in zip(groups, counts, strict=True)}
                return
        raise out_of_reach({"macs": self.target.macs}, {"macs": macs / max(1, self.macs)})

    def limit(self, share: float) -> float:
        """Multiply-accumulates that may remain when the network is `share` of the way to a budget of them."""
        return self.macs * (1 - share * (1 - (self.target.macs or 0.0)))

    def state_dict(self) -> dict[str, int | dict[str, int]]:
        """What does not follow from the options and the network as it is."""
        return {"full": dict(self.full), "macs": self.macs, "widths": dict(self.chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.full = {name: int(size) for name, size in state["full"].items()}
        self.chosen = {name: int(width) for name, width in state.get("widths", {}).items()}
        self.macs = int(state.get("macs", 0))


def clustering_curve(
    ranked: RankedGroup, widths: Sequence[int], tensors: Mapping[str, Tensor], kind: Features
) -> LossCurve:
    """What clustering a group to each of these widths, the first its present one, loses.

    The loss is -log of the share of the units' directions that so many clusters explain, 1 - Σ ‖direction - cluster
    mean‖² / units: shares multiply along the network, so that none becomes a bottleneck. It is estimated for all widths
    in one pass, by `merging_inertias`.
    """
    group = ranked.group
    rows = features(group, tensors, kind)
    inertias = [merging_inertias(rows[list(part.units)]) for part in parts(group)]
    losses = {group.size: 0.0}
    for width in widths[1:]:
        kept = ranked.shared_out(width)
        lost = sum(float(curve[number - 1]) for curve, number in zip(inertias, kept, strict=True)) / group.size
        losses[width] = -log(max(1 - lost, 1e-6))
    following = {width: (fewer,) for width, fewer in pairwise(widths)}
    return LossCurve(losses, lambda width: following.get(width, ()))


def check_sizes(there: Mapping[str, int], here: Mapping[str, int]) -> None:
    """**Raises:** `CheckpointError` naming the first group that a state and a network do not agree on."""
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"online clustering: group {name!r} has {here.get(name)} units, the state says {there.get(name)}: "
                "restore the model before it"
            )
