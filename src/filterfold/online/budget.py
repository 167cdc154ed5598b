"""Widths under one budget for the whole network: groups that cluster well give more of their units."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

from torch import Tensor

from ..cost import Cost
from ..errors import SelectionError
from ..folding import Features, share_out
from ..groups import ChannelGroup
from ..selection.forecast import axes, per_unit, shrunk
from .grouping import regroup

_STEPS = 12
"""Widths tried for each group between its full one and the least."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """One group: its widths from full to least, the clustering loss at each, and positions per unit on its axes."""

    size: int
    widths: tuple[int, ...]
    losses: tuple[float, ...]
    positions: Mapping[tuple[str, int], int]


def widths_for(
    groups: Sequence[ChannelGroup],
    tensors: Mapping[str, Tensor],
    cost: Cost,
    macs: float,
    *,
    kind: Features = "units",
    round_to: int = 1,
    seed: int = 0,
) -> dict[str, int]:
    """Narrow, step by step, the group that pays least in clustering loss for each multiply-accumulate saved.

    The loss of a group at a width is -log of the share of its units' directions that so many clusters explain,
    1 - Σ ‖direction - cluster mean‖² / units: shares multiply along the network, so that none becomes a bottleneck.

    **Arguments:**

    - `groups`: those that may be folded; `tensors`: of the network as it is; `cost`: what `measure` says of it.
    - `macs`: multiply-accumulates of one example that may remain.
    - `kind`, `seed`: as in `regroup`. `round_to`: new widths are multiples of this.

    **Returns:** group name → units that stay.

    **Raises:** `SelectionError` if the narrowest network tried is still over the budget.
    """
    curves = {group.name: _curve(group, tensors, kind, round_to, seed) for group in groups}
    at = dict.fromkeys(curves, 0)

    def price(name: str) -> float:
        curve, index = curves[name], at[name]
        saved = now - _macs(cost, curves, at | {name: index + 1})
        return max(curve.losses[index + 1] - curve.losses[index], 0.0) / max(saved, 1)

    now = _macs(cost, curves, at)
    queue = [(price(name), name) for name, curve in curves.items() if len(curve.widths) > 1]
    heapq.heapify(queue)
    while now > macs:
        if not queue:
            raise SelectionError(
                f"macs: {now:,} remain in the narrowest network, {macs:,.0f} are asked for: ask for more"
            )
        _, name = heapq.heappop(queue)
        fresh = (price(name), name)  # as others narrow, a step saves less: prices only rise
        if queue and fresh > queue[0]:
            heapq.heappush(queue, fresh)
            continue
        at[name] += 1
        now = _macs(cost, curves, at)
        if at[name] + 1 < len(curves[name].widths):
            heapq.heappush(queue, (price(name), name))
    return {name: curve.widths[at[name]] for name, curve in curves.items()}


def _macs(cost: Cost, curves: Mapping[str, _Curve], at: Mapping[str, int]) -> int:
    removed: dict[tuple[str, int], int] = {}
    for name, curve in curves.items():
        gone = curve.size - curve.widths[at[name]]
        for key, count in curve.positions.items():
            removed[key] = removed.get(key, 0) + gone * count
    return shrunk(cost, removed).macs


def _curve(group: ChannelGroup, tensors: Mapping[str, Tensor], kind: Features, round_to: int, seed: int) -> _Curve:
    steps = {max(int(group.size * step / _STEPS / round_to), 1) * round_to for step in range(1, _STEPS)}
    widths, losses = [group.size], [0.0]
    for width in sorted((step for step in steps if step < group.size), reverse=True):
        counts = share_out(group, width)
        if sum(counts) >= widths[-1]:
            continue
        widths.append(sum(counts))
        lost = regroup(group, tensors, counts, None, kind=kind, seed=seed)[1]["inertia"] / group.size
        losses.append(-log(max(1 - lost, 1e-6)))
    positions = {key: max(per_unit(units, group.size)) for key, units in axes(group.producers, group.consumers).items()}
    return _Curve(group.size, tuple(widths), tuple(losses), positions)
