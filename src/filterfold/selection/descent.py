"""What layers take at any widths, and the way down from the full widths to the smallest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import log, prod

from ..latency import LayerCall, LayerTimes
from ..progress import track
from .forecast import axes, per_unit
from .order import Room

Counts = tuple[int, ...]
"""Kept units, one entry for each room."""

_GRID = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of a layer's widths at which it is timed; between them time is taken as linear in each width."""

_AHEAD = 3
"""How many smaller widths of a group are looked at for the next step: a single one may save nothing."""


def friendly(room: Room, step: int) -> Room:
    """Leave a room only the numbers of units that the hardware likes: multiples of `step`, and powers of two below.

    >>> from filterfold.groups import ChannelGroup
    >>> group = ChannelGroup("a", 40, (), (), True, None, (0,) * 40, (0,) * 40)
    >>> friendly(Room(group, (), tuple(range(40)), tuple(range(3, 41))), 16).allowed
    (4, 8, 16, 32, 40)
    """

    def liked(count: int) -> bool:
        return count == room.group.size or count % step == 0 or (count < step and count & (count - 1) == 0)

    return replace(room, allowed=tuple(count for count in room.allowed if liked(count)))


class Forecast:
    """Seconds of the whole network for any numbers of kept units.

    The network's time is that of its convolutions and linear layers, each timed alone at a few widths, plus the
    rest (normalisation, activations, overhead), which is shared out among the layers by the size of their outputs.

    **Arguments:**

    - `rooms`: the groups.
    - `calls`: what the network calls, at full widths.
    - `times`: measures single calls.
    - `whole`: seconds of the whole uncut network.
    """

    def __init__(self, rooms: Sequence[Room], calls: Sequence[LayerCall], times: LayerTimes, whole: float) -> None:
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
        outputs = [prod(call.data) / call.data[_channel(call)] * call.weight[call.out_axis] for call in calls]
        alone = [times.seconds(call) for call in calls]
        rest = max(0.0, whole - sum(alone))
        self._rest = [rest * output / sum(outputs) for output in outputs]
        self._fixed = 0.0 if calls else whole
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

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
            self._known[key] = self._interpolated(call, (max(1, shape[0]), max(1, shape[1]))) + (
                self._rest[number] * share
            )
        return self._known[key]

    def _interpolated(self, call: LayerCall, widths: tuple[int, int]) -> float:
        """Between the four nearest grid points."""
        total = 0.0
        for first, weight in _between(call.weight[0], widths[0]):
            for second, other in _between(call.weight[1], widths[1]):
                total += weight * other * self._times.seconds(call.at((first, second, *call.weight[2:])))
        return total


def _channel(call: LayerCall) -> int:
    return len(call.data) - 1 if call.op == "linear" else 1


def _between(size: int, width: int) -> Iterator[tuple[int, float]]:
    """The grid points of a width on both sides of it, with their weights.

    >>> list(_between(64, 24)), list(_between(64, 64)), list(_between(3, 3))
    ([(16, 0.5), (32, 0.5)], [(64, 1.0)], [(3, 1.0)])
    """
    points = sorted({max(1, round(size * share)) for share in _GRID})
    above = bisect_left(points, width)
    if above == 0 or points[above] == width:
        yield points[above], 1.0
        return
    low, high = points[above - 1], points[above]
    part = (width - low) / (high - low)
    yield low, 1 - part
    yield high, part


def descend(rooms: Sequence[Room], forecast: Forecast) -> list[Counts]:
    """All stations on the way from the full widths down to the smallest.

    Every step takes the units of one group whose loss is smallest for the time saved. The loss is the fall of
    log(share of the group's scores that is kept): the same share lost weighs the same in every group, and more the
    fewer are left, so that no layer becomes a bottleneck because it happens to be slow.
    """
    kept = [_log_kept(room) for room in rooms]
    counts = forecast.full
    stations = [counts]
    best: list[tuple[float, int] | None] = [_step(room, kept[i], forecast, counts, i) for i, room in enumerate(rooms)]
    steps = sum(len(room.allowed) - 1 for room in rooms)
    for _ in track(range(steps), "timing layers at smaller widths", steps):
        if not any(best):
            break  # a step may take several widths at once
        index = max((i for i, step in enumerate(best) if step), key=lambda i: (best[i] or (0.0, 0))[0])
        counts = (*counts[:index], (best[index] or (0.0, 0))[1], *counts[index + 1 :])
        stations.append(counts)
        for other in {index} | {i for call in forecast.touched[index] for i in forecast.touching[call]}:
            best[other] = _step(rooms[other], kept[other], forecast, counts, other)
    return stations


def _step(
    room: Room, kept: Sequence[float], forecast: Forecast, counts: Counts, index: int
) -> tuple[float, int] | None:
    """The best next width of a group: (seconds saved per loss, units kept); None at its smallest."""
    place = bisect_left(room.allowed, counts[index])
    choices = [
        (forecast.saved(counts, index, fewer) / max(1e-12, kept[counts[index]] - kept[fewer]), fewer)
        for fewer in room.allowed[max(0, place - _AHEAD) : place]
    ]
    return max(choices, default=None)


def _log_kept(room: Room) -> list[float]:
    """log(share of the scores) for every number of kept units; entry 0 is never used."""
    lowest = min(room.scores, default=0.0)
    values = [room.scores[unit] - min(lowest, 0.0) for unit in room.order]
    if not sum(values) > 0:
        values = [1.0] * len(values)
    total = sum(values)
    shares = accumulate((value / total for value in values), initial=0.0)
    return [log(max(share, 1e-9)) for share in shares]
