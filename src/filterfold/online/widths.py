"""Widths under one budget for the whole network: groups that cluster well give more of their units."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod

from torch import Tensor

from ..errors import SelectionError
from ..plan import ChannelGroup
from ..profiling.macs import Cost
from ..profiling.predict import axes, per_unit
from .clustering import merging_inertias
from .folding import Features, features, parts, share_out
from .targets import multiple

_LEAST = 12
"""No group gets narrower than this part of its first width: where all else is dear, one layer would pay for all."""


_STEPS = 48
"""Widths tried for each group from its full one down to none, as far as multiples of `round_to` allow."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """One group from full width to least: units kept in each of its parts, and what clustering loses."""

    counts: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]


def widths_for(
    groups: Sequence[ChannelGroup],
    tensors: Mapping[str, Tensor],
    cost: Cost,
    macs: float,
    *,
    kind: Features = "units",
    round_to: int | None = 1,
    full: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Narrow, step by step, the group that pays least in clustering loss for each multiply-accumulate saved.

    The loss of a group at a width is -log of the share of its units' directions that so many clusters explain,
    1 - Σ ‖direction - cluster mean‖² / units: shares multiply along the network, so that none becomes a bottleneck.
    They are estimated at all widths in one pass, by `merging_inertias`.

    **Arguments:**

    - `groups`: those that may be folded; `tensors`: of the network as it is; `cost`: what `measure` says of it.
    - `macs`: multiply-accumulates of one example that may remain.
    - `kind`: what units are compared by, as in `features`. `round_to`: new widths are multiples of this; None: see
      `multiple`. `full`: group name → units that it began with, where it has been narrowed already.

    **Returns:** group name → units that stay.

    **Raises:** `SelectionError` if the narrowest network tried is still over the budget.
    """
    sizes = {group.name: group.size for group in groups} | dict(full or {})
    curves = {group.name: _curve(group, tensors, kind, round_to, sizes[group.name]) for group in groups}
    ledger = _Ledger(groups, cost)
    at = dict.fromkeys(curves, 0)

    def price(name: str) -> float:
        curve, index = curves[name], at[name]
        saved = ledger.saved(name, _less(curve, index))
        return max(curve.losses[index + 1] - curve.losses[index], 0.0) / max(saved, 1)

    queue = [(price(name), name) for name, curve in curves.items() if len(curve.counts) > 1]
    heapq.heapify(queue)
    while ledger.macs > macs:
        if not queue:
            raise SelectionError(
                f"macs: {ledger.macs:,} remain in the narrowest network, {macs:,.0f} are asked for: ask for more"
            )
        _, name = heapq.heappop(queue)
        fresh = (price(name), name)  # as others narrow, a step saves less: prices only rise
        if queue and fresh > queue[0]:
            heapq.heappush(queue, fresh)
            continue
        ledger.remove(name, _less(curves[name], at[name]))
        at[name] += 1
        if at[name] + 1 < len(curves[name].counts):
            heapq.heappush(queue, (price(name), name))
    return {name: sum(curve.counts[at[name]]) for name, curve in curves.items()}


def _curve(
    group: ChannelGroup, tensors: Mapping[str, Tensor], kind: Features, round_to: int | None, full: int
) -> _Curve:
    pieces = parts(group)
    inertias = [merging_inertias(features(group, part, tensors, kind)) for part in pieces]
    unit = multiple(round_to, full)
    step = max(-(-group.size // _STEPS // unit), 1) * unit
    least = max(full // _LEAST // unit, 1) * unit
    counts, losses = [tuple(len(part.units) for part in pieces)], [0.0]
    for width in range((group.size - 1) // step * step, least - 1, -step):
        kept = share_out(group, width)
        if sum(kept) >= sum(counts[-1]):
            continue
        lost = sum(float(curve[count - 1]) for curve, count in zip(inertias, kept, strict=True)) / group.size
        counts.append(kept)
        losses.append(-log(max(1 - lost, 1e-6)))
    return _Curve(tuple(counts), tuple(losses))


def _less(curve: _Curve, index: int) -> tuple[int, ...]:
    """Units that go from each part with the next step."""
    return tuple(now - then for now, then in zip(curve.counts[index], curve.counts[index + 1], strict=True))


class _Ledger:
    """The network's multiply-accumulates while its groups narrow: only layers that a step touches are counted anew.

    `macs` is what `selection.forecast.predict` says of a plan that removes as much.
    """

    def __init__(self, groups: Sequence[ChannelGroup], cost: Cost) -> None:
        self.macs = cost.macs
        self.uses: Counter[str] = Counter()
        self.shape: dict[str, list[int]] = {}
        for layer in cost.layers:
            if layer.shape == cost.shapes.get(layer.tensor, layer.shape):  # else used in parts: which are cut?
                self.uses[layer.tensor] += layer.uses
                self.shape[layer.tensor] = list(layer.shape)
        self.positions = {group.name: list(self._positions(group)) for group in groups}

    def _positions(self, group: ChannelGroup) -> Sequence[tuple[str, int, tuple[int, ...]]]:
        """(tensor, axis, positions along it of a unit of each part) for the weights that the group's units lie on."""
        found = []
        for (tensor, axis), units in axes(group.producers, group.consumers).items():
            if tensor in self.shape:
                own = per_unit(units, group.size)
                found.append((tensor, axis, tuple(own[part.units[0]] for part in parts(group))))
        return found

    def saved(self, name: str, less: Sequence[int]) -> int:
        """Multiply-accumulates saved if so many units of each part of a group go."""
        return self._shrink(name, less, keep=False)

    def remove(self, name: str, less: Sequence[int]) -> None:
        """Take them out."""
        self.macs -= self._shrink(name, less, keep=True)

    def _shrink(self, name: str, less: Sequence[int], *, keep: bool) -> int:
        shapes: dict[str, list[int]] = {}
        for tensor, axis, positions in self.positions[name]:
            shape = shapes.setdefault(tensor, list(self.shape[tensor]))
            shape[axis] -= sum(count * own for count, own in zip(less, positions, strict=True))
        saved = sum(self.uses[tensor] * (prod(self.shape[tensor]) - prod(shape)) for tensor, shape in shapes.items())
        if keep:
            self.shape.update(shapes)
        return saved
