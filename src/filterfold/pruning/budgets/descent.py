"""What layers take at any widths, and the way down from the full widths to the smallest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, product
from math import prod

from ...profiling import LayerCall, LayerTimes
from ...profiling.predict import axes, per_unit
from .ranking import RankedGroup

Counts = tuple[int, ...]
"""Kept units, one entry for each room."""


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


def friendly(room: RankedGroup, step: int) -> RankedGroup:
    """Leave a room only the numbers of units that the hardware likes: multiples of `step`, and powers of two below.

    >>> from filterfold.plan import ChannelGroup
    >>> group = ChannelGroup("a", 40, (), (), True, None, (0,) * 40, (0,) * 40)
    >>> friendly(RankedGroup(group, (), tuple(range(40)), tuple(range(3, 41))), 16).allowed
    (4, 8, 16, 32, 40)
    """

    def liked(count: int) -> bool:
        return count == room.group.size or count % step == 0 or (count < step and count & (count - 1) == 0)

    return replace(room, allowed=tuple(count for count in room.allowed if liked(count)))


class LayerTimeModel:
    """Seconds of the whole network for any numbers of kept units.

    The network's time is that of its convolutions and linear layers, each timed alone at a few widths, plus the
    rest (normalisation, activations, overhead), which is shared out among the layers by the size of their outputs.

    **Arguments:**

    - `rooms`: the groups.
    - `calls`: what the network calls, at full widths.
    - `times`: measures single calls.
    - `whole`: seconds of the whole uncut network.
    """

    def __init__(
        self, rooms: Sequence[RankedGroup], calls: Sequence[LayerCall], times: LayerTimes, whole: float
    ) -> None:
        self.full: Counts = tuple(room.group.size for room in rooms)
        self._calls, self._times = calls, times
        self._removed: dict[str, list[tuple[int, int, list[int]]]] = {}
        for index, room in enumerate(rooms):
            for (tensor, axis), units in axes(room.group.producers, room.group.consumers).items():
                positions = per_unit(units, room.group.size)
                total = sum(positions)
                removed = [total - kept for kept in accumulate((positions[unit] for unit in room.order), initial=0)]
                self._removed.setdefault(tensor, []).append((axis, index, removed))
        self.touched: list[list[int]] = [[] for _ in rooms]
        self.touching: list[list[int]] = []
        for number, call in enumerate(calls):
            by = sorted({index for _, index, _ in self._removed.get(call.tensor, ())})
            self.touching.append(by)
            for index in by:
                self.touched[index].append(number)
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
        return sum(self._layer(number, counts) - self._layer(number, after) for number in self.touched[index])

    def _layer(self, number: int, counts: Counts) -> float:
        call = self._calls[number]
        shape = list(call.weight)
        for axis, index, removed in self._removed.get(call.tensor, ()):
            if axis < len(shape):
                shape[axis] -= removed[counts[index]]
        key = number, tuple(shape)
        if key not in self._known:
            share = shape[call.out_axis] / max(1, call.weight[call.out_axis])
            alone = self._interpolated(number, (max(1, shape[0]), max(1, shape[1])))
            self._known[key] = alone + self._rest[number] * share
        return self._known[key]

    def _grid(self, call: LayerCall) -> tuple[list[int], list[int]]:
        """The widths along both axes at which a layer is timed."""
        cut = {axis for axis, _, _ in self._removed.get(call.tensor, ())}
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


def descend(rooms: Sequence[RankedGroup], forecast: LayerTimeModel) -> list[Counts]:
    """All stations on the way from the full widths down to the smallest.

    Every step takes the units of one group whose loss is smallest for the time saved. The loss is the rise of
    1 / (share of the group's scores that is kept)²: the same share lost weighs the same in every group, and more the
    fewer are left, so that no layer becomes a bottleneck because it happens to be slow.
    """
    losses = [_losses(room) for room in rooms]
    counts = forecast.full
    stations = [counts]
    best: list[tuple[float, int] | None] = [_step(room, losses[i], forecast, counts, i) for i, room in enumerate(rooms)]
    while any(best):
        index = max((i for i, step in enumerate(best) if step), key=lambda i: (best[i] or (0.0, 0))[0])
        counts = (*counts[:index], (best[index] or (0.0, 0))[1], *counts[index + 1 :])
        stations.append(counts)
        for other in {index} | {i for call in forecast.touched[index] for i in forecast.touching[call]}:
            best[other] = _step(rooms[other], losses[other], forecast, counts, other)
    return stations


def _step(
    room: RankedGroup, losses: Sequence[float], forecast: LayerTimeModel, counts: Counts, index: int
) -> tuple[float, int] | None:
    """The best next width of a group: (seconds saved per loss, units kept); None at its smallest."""
    place = bisect_left(room.allowed, counts[index])
    fewer = set(room.allowed[max(0, place - _AHEAD) : place])
    fewer |= {width for share in _FURTHER if (width := room.nearest(int(share * counts[index]))) < counts[index]}
    return max(
        ((forecast.saved(counts, index, n) / max(1e-12, losses[n] - losses[counts[index]]), n) for n in fewer),
        default=None,
    )


def _losses(room: RankedGroup) -> list[float]:
    """1 / (share of the scores that is kept)² for every number of kept units; entry 0 is never used."""
    lowest = min(room.scores, default=0.0)
    values = [room.scores[unit] - min(lowest, 0.0) for unit in room.order]
    if not sum(values) > 0:
        values = [1.0] * len(values)
    total = sum(values)
    shares = accumulate((value / total for value in values), initial=0.0)
    return [max(share, 1e-6) ** -_BARRIER for share in shares]
