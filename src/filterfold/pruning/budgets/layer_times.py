"""The time of a network for any numbers of kept units, from the times of its layers; the loss that goes with it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from math import prod

from ...profiling import LayerCall, LayerTimes
from .prices import Counts, RemovedPositions
from .ranking import RankedGroup
from .solver import LossCurve

_GRID = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of a layer's widths at which it is timed; between them time is taken as linear in each width."""


_BARRIER = 2
"""The loss of a group is 1 / share² of its scores kept: a group that takes ten times as long is narrowed to about half
as much as another. With log(share) instead, VGG-16 at a quarter of its time got bottlenecks of 1/4 beside whole layers.
"""


_AHEAD = 3


_FURTHER = (3 / 4, 1 / 2, 1 / 4)
"""The smaller widths of a group that are looked at for the next step: so many, and those at these shares of the present
one; a single width less may save nothing."""


class LayerTimeModel:
    """Seconds of the whole network for any numbers of kept units.

    The network's time is that of its convolutions and linear layers, each timed alone at a few widths, plus the
    rest (normalisation, activations, overhead), which is shared out among the layers by the size of their outputs.

    **Arguments:**

    - `ranked`: the groups.
    - `calls`: what the network calls, at full widths.
    - `times`: measures single calls.
    - `whole`: seconds of the whole uncut network.
    """

    def __init__(
        self, ranked: Sequence[RankedGroup], calls: Sequence[LayerCall], times: LayerTimes, whole: float
    ) -> None:
        self.full: Counts = tuple(entry.group.size for entry in ranked)
        self._calls, self._times = calls, times
        self._positions = RemovedPositions(ranked)
        on_call = [self._positions.groups(call.tensor) for call in calls]
        self._touched = [[n for n, groups in enumerate(on_call) if index in groups] for index in range(len(ranked))]
        self.neighbours = [
            {index}.union(*(on_call[number] for number in numbers)) for index, numbers in enumerate(self._touched)
        ]
        self._grids = [self._grid(call) for call in calls]
        times.measure(
            call.at((*widths, *call.weight[2:]))
            for call, grid in zip(calls, self._grids, strict=True)
            for widths in product(*grid)
        )
        outputs = [prod(call.data) / call.data[_channel(call)] * call.weight[call.out_axis] for call in calls]
        alone = [times.seconds(call) for call in calls]
        rest = max(0.0, whole - sum(alone))
        self._rest = [rest * output / sum(outputs) for output in outputs]
        self._fixed = 0.0 if calls else whole
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self._corners: dict[tuple[int, int, int], float] = {}

    def seconds(self, counts: Counts) -> float:
        """Of the whole network."""
        return self._fixed + sum(self._layer(number, counts) for number in range(len(self._calls)))

    def saved(self, counts: Counts, index: int, fewer: int) -> float:
        """Seconds saved by one group's keeping fewer units."""
        after = (*counts[:index], fewer, *counts[index + 1 :])
        return sum(self._layer(number, counts) - self._layer(number, after) for number in self._touched[index])

    def _layer(self, number: int, counts: Counts) -> float:
        call = self._calls[number]
        shape = self._positions.shape(call.tensor, call.weight, counts)
        key = number, tuple(shape)
        if key not in self._known:
            share = shape[call.out_axis] / max(1, call.weight[call.out_axis])
            alone = self._interpolated(number, (max(1, shape[0]), max(1, shape[1])))
            self._known[key] = alone + self._rest[number] * share
        return self._known[key]

    def _grid(self, call: LayerCall) -> tuple[list[int], list[int]]:
        """The widths along both axes at which a layer is timed."""
        cut = {axis for axis, _, _ in self._positions.of.get(call.tensor, ())}
        first, second = (
            sorted({max(1, round(call.weight[axis] * share)) for share in (_GRID if axis in cut else (1.0,))})
            for axis in (0, 1)
        )
        return first, second

    def _interpolated(self, number: int, widths: tuple[int, int]) -> float:
        """Between the four nearest grid points."""
        total = 0.0
        for first, weight in _between(self._grids[number][0], widths[0]):
            for second, other in _between(self._grids[number][1], widths[1]):
                total += weight * other * self._corner(number, first, second)
        return total

    def _corner(self, number: int, first: int, second: int) -> float:
        """Seconds at a grid point: no more than at any wider one, as a layer could always be padded."""
        key = number, first, second
        if key not in self._corners:
            call, (rows, columns) = self._calls[number], self._grids[number]
            wider = product((n for n in rows if n >= first), (n for n in columns if n >= second))
            self._corners[key] = min(self._times.seconds(call.at((*widths, *call.weight[2:]))) for widths in wider)
        return self._corners[key]


def _channel(call: LayerCall) -> int:
    return len(call.data) - 1 if call.op == "linear" else 1


def _between(points: Sequence[int], width: int) -> Iterator[tuple[int, float]]:
    """The grid points on both sides of a width, with their weights.

    >>> list(_between([16, 32], 24)), list(_between([16, 32], 32)), list(_between([16, 32], 3))
    ([(16, 0.5), (32, 0.5)], [(32, 1.0)], [(16, 1.0)])
    """
    above = bisect_left(points, width)
    if above == 0 or points[above] == width:
        yield points[above], 1.0
        return
    low, high = points[above - 1], points[above]
    part = (width - low) / (high - low)
    yield low, 1 - part
    yield high, part


def score_curve(ranked: RankedGroup) -> LossCurve:
    """The rise of 1 / (share of the group's scores that is kept)² as its loss.

    The same share lost weighs the same in every group, and more the fewer are left, so that no layer becomes a
    bottleneck because it happens to be slow.
    """

    def narrower(now: int) -> set[int]:
        place = bisect_left(ranked.allowed, now)
        fewer = set(ranked.allowed[max(0, place - _AHEAD) : place])
        return fewer | {width for share in _FURTHER if (width := ranked.nearest(int(share * now))) < now}

    return LossCurve(_losses(ranked), narrower)


def _losses(ranked: RankedGroup) -> list[float]:
    """1 / (share of the scores that is kept)² for every number of kept units; entry 0 is never used."""
    lowest = min(ranked.scores, default=0.0)
    values = [ranked.scores[unit] - min(lowest, 0.0) for unit in ranked.order]
    if not sum(values) > 0:
        values = [1.0] * len(values)
    total = sum(values)
    shares = accumulate((value / total for value in values), initial=0.0)
    return [max(share, 1e-6) ** -_BARRIER for share in shares]
