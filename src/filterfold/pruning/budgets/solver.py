"""The numbers of kept units that meet a budget, by binary search over a monotone family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from ...errors import SelectionError
from ...profiling.macs import Cost
from ...profiling.predict import axes, per_unit, shrunk
from .ranking import RankedGroup

Scope = Literal["layer", "global"]


Normalize = Literal["mean", "max", "l2", "none"]


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().max(),
    "l2": lambda scores: scores.norm(),
    "none": torch.ones_like,
}


def count(size: int, share: float) -> int:
    """`int(size * share)` with float noise removed, the count of Li et al. (2017).

    >>> count(10, 1 - 0.9), int(10 * (1 - 0.9))
    (1, 0)
    """
    return int(round(size * share, 9 if size < 10**6 else 3))  # the noise grows with the size


def search(
    ranked: Sequence[RankedGroup], shares: Mapping[str, float], cost: Cost | None, scope: Scope, normalize: Normalize
) -> list[int]:
    """The largest numbers of kept units, one per group, whose amounts are within the shares.

    With larger indices a family (common keep ratios, or prefixes of the global ranking) only grows,
    so binary search finds its largest member that fits. What is left of the budget goes to single
    groups: one step to each in order, or on along the ranking, leaving out what does not fit.
    """
    meter = _Meter(ranked, None if "units" in shares else cost)
    totals = meter.amounts([room.group.size for room in ranked])
    limits = {name: count(totals[name], share) for name, share in shares.items()}

    def fits(counts: Sequence[int]) -> bool:
        amounts = meter.amounts(counts)
        return all(amounts[name] <= limit for name, limit in limits.items())

    length, counts_at, following = _uniform(ranked) if scope == "layer" else _ranking(ranked, normalize)
    if not fits(counts_at(0)):
        least = meter.amounts(counts_at(0))
        asked = ", ".join(f"{'keep' if name == 'units' else name}={share:g}" for name, share in shares.items())
        reachable = ", ".join(f"{name} {ceil(1e4 * least[name] / max(1, totals[name])) / 1e4:.4f}" for name in shares)
        raise SelectionError(f"{asked} can't be met: the smallest share within reach is {reachable}")
    low, high = 0, length
    while high - low > 1:  # invariant: low fits, high does not (or is the end)
        middle = (low + high) // 2
        low, high = (middle, high) if fits(counts_at(middle)) else (low, middle)
    counts, closed = counts_at(low), set()
    for index in following(low):
        if index not in closed:
            trial = list(counts)
            trial[index] = ranked[index].more(counts[index])
            fitting = trial != counts and fits(trial)
            if not fitting or trial[index] > counts[index] + 1:
                closed.add(index)  # one step of `round_to` at most: the ranking asked for one unit
            counts = trial if fitting else counts
    return counts


Family = tuple[int, Callable[[int], list[int]], Callable[[int], Iterable[int]]]
"""Number of members, the counts of each, and the groups that may take more after each, in order."""


def _uniform(ranked: Sequence[RankedGroup]) -> Family:
    """All common keep ratios that make a difference, from the smallest."""
    sizes = {room.group.size for room in ranked}
    ratios = sorted({Fraction(count, size) for size in sizes for count in range(size + 1)})

    def counts_at(at: int) -> list[int]:
        return [room.nearest(int(room.group.size * ratios[at])) for room in ranked]

    return len(ratios), counts_at, lambda _: range(len(ranked))


def _ranking(ranked: Sequence[RankedGroup], normalize: Normalize) -> Family:
    """Prefixes of the ranking over all groups, from the shortest."""
    entries = []
    for index, room in enumerate(ranked):
        scores = torch.tensor(room.scores, dtype=torch.float64)
        scale = NORMS[normalize](scores)
        scaled = torch.where(scale > 0, scores / scale, scores).sort(descending=True, stable=True).values.tolist()
        entries += [(-score, index, rank) for rank, score in enumerate(scaled) if rank >= room.allowed[0]]
    entries.sort()

    def counts_at(at: int) -> list[int]:
        counts = [room.allowed[0] for room in ranked]
        for _, index, _ in entries[:at]:
            counts[index] += 1
        return [room.nearest(count) for room, count in zip(ranked, counts, strict=True)]

    return len(entries) + 1, counts_at, lambda at: (index for _, index, _ in entries[at:])


class _Meter:
    """Units, MACs and parameters for any numbers of kept units, by table."""

    def __init__(self, ranked: Sequence[RankedGroup], cost: Cost | None) -> None:
        self.cost = cost
        self.tables: list[tuple[tuple[str, int], int, list[int]]] = []
        for index, room in enumerate(ranked):
            for key, units in axes(room.group.producers, room.group.consumers).items():
                positions = per_unit(units, room.group.size)
                total = sum(positions)
                removed = [total - kept for kept in accumulate((positions[unit] for unit in room.order), initial=0)]
                self.tables.append((key, index, removed))

    def amounts(self, counts: Sequence[int]) -> dict[str, int]:
        amounts = {"units": sum(counts)}
        if self.cost is not None:
            removed: dict[tuple[str, int], int] = {}
            for key, index, table in self.tables:
                removed[key] = removed.get(key, 0) + table[counts[index]]
            after = shrunk(self.cost, removed)
            amounts |= {"macs": after.macs, "parameters": after.parameters}
        return amounts
