"""The numbers of kept units that meet a budget.

Every budget is met in the same way. There is a sequence of widths, each no wider than the one before: common keep
ratios, prefixes of a ranking over all groups, or a descent on which every step takes the units whose loss is smallest
for what they save. A price model says what the network takes at any widths. Looked for are the widest of the sequence
that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from ...errors import SelectionError
from .prices import Counts, Prices, SizePrices
from .ranking import RankedGroup, count

Scope = Literal["layer", "global"]


Normalize = Literal["mean", "max", "l2", "none"]


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().max(),
    "l2": lambda scores: scores.norm(),
    "none": torch.ones_like,
}


def last_that_fits(length: int, fits: Callable[[int], bool]) -> int | None:
    """The last member of a sequence that fits, by halving; None if not even the first does.

    **Arguments:** `fits`: true of the members 0 … n of the sequence for some n, and of no others.

    >>> last_that_fits(10, lambda member: member**2 < 30)
    5
    """
    if length == 0 or not fits(0):
        return None
    low, high = 0, length
    while high - low > 1:  # low fits; high does not, or is the end
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def out_of_reach(asked: Mapping[str, float], reachable: Mapping[str, float]) -> SelectionError:
    """The error for a budget that can't be met: what was asked, and the smallest shares that can be had."""
    wanted = ", ".join(f"{name}={share:g}" for name, share in asked.items())
    least = ", ".join(f"{name} {ceil(1e4 * share) / 1e4:.4f}" for name, share in reachable.items())
    return SelectionError(f"{wanted} can't be met: the smallest share within reach is {least}")


def search(
    ranked: Sequence[RankedGroup], shares: Mapping[str, float], prices: SizePrices, scope: Scope, normalize: Normalize
) -> list[int]:
    """The largest numbers of kept units, one per group, whose amounts are within the shares.

    The widest common keep ratio, or the longest prefix of the global ranking, that fits; what is left of the budget
    goes to single groups: one step to each in order, or on along the ranking, leaving out what does not fit.

    **Arguments:** `shares`: of "units", "macs" or "parameters".
    """
    totals = prices.amounts(prices.full)
    limits = {name: count(totals[name], share) for name, share in shares.items()}

    def fits(counts: Sequence[int]) -> bool:
        amounts = prices.amounts(counts)
        return all(amounts[name] <= limit for name, limit in limits.items())

    family = _common_ratios(ranked) if scope == "layer" else _ranking(ranked, normalize)
    member = last_that_fits(family.length, lambda member: fits(family.counts(member)))
    if member is None:
        least = prices.amounts(family.counts(0))
        asked = {"keep" if name == "units" else name: share for name, share in shares.items()}
        raise out_of_reach(asked, {name: least[name] / max(1, totals[name]) for name in shares})
    counts, closed = family.counts(member), set()
    for index in family.following(member):
        if index not in closed:
            trial = list(counts)
            trial[index] = ranked[index].more(counts[index])
            fitting = trial != counts and fits(trial)
            if not fitting or trial[index] > counts[index] + 1:
                closed.add(index)  # one step of `round_to` at most: the ranking asked for one unit
            counts = trial if fitting else counts
    return counts


@dataclass(frozen=True, slots=True)
class _Family:
    """Widths that grow with the member's number, and the groups that may take more after each, in order."""

    length: int
    counts: Callable[[int], list[int]]
    following: Callable[[int], Iterable[int]]


def _common_ratios(ranked: Sequence[RankedGroup]) -> _Family:
    """All common keep ratios that make a difference, from the smallest."""
    sizes = {entry.group.size for entry in ranked}
    ratios = sorted({Fraction(number, size) for size in sizes for number in range(size + 1)})

    def counts(member: int) -> list[int]:
        return [entry.nearest(int(entry.group.size * ratios[member])) for entry in ranked]

    return _Family(len(ratios), counts, lambda _: range(len(ranked)))


def _ranking(ranked: Sequence[RankedGroup], normalize: Normalize) -> _Family:
    """Prefixes of the ranking over all groups, from the shortest."""
    entries = []
    for index, entry in enumerate(ranked):
        scores = torch.tensor(entry.scores, dtype=torch.float64)
        scale = NORMS[normalize](scores)
        scaled = torch.where(scale > 0, scores / scale, scores).sort(descending=True, stable=True).values.tolist()
        entries += [(-score, index, place) for place, score in enumerate(scaled) if place >= entry.allowed[0]]
    entries.sort()

    def counts(member: int) -> list[int]:
        kept = [entry.allowed[0] for entry in ranked]
        for _, index, _ in entries[:member]:
            kept[index] += 1
        return [entry.nearest(number) for entry, number in zip(ranked, kept, strict=True)]

    return _Family(len(entries) + 1, counts, lambda member: (index for _, index, _ in entries[member:]))


@dataclass(frozen=True, slots=True)
class LossCurve:
    """What one group loses at each width: `loss` by kept units, and the narrower widths to look at from each."""

    loss: Mapping[int, float] | Sequence[float]
    narrower: Callable[[int], Iterable[int]]


def descend(curves: Sequence[LossCurve], prices: Prices) -> Iterator[Counts]:
    """All widths on the way from the full ones down to the smallest, one group narrower with each step.

    Every step is the one, of all groups, that saves most for the loss that it adds.
    """
    counts = prices.full

    def step(index: int) -> tuple[float, int] | None:
        curve, now = curves[index], counts[index]
        return max(
            (
                (prices.saved(counts, index, width) / max(1e-12, curve.loss[width] - curve.loss[now]), width)
                for width in curve.narrower(now)
            ),
            default=None,
        )

    best = {index: found for index in range(len(curves)) if (found := step(index)) is not None}
    yield counts
    while best:
        index = max(best, key=lambda index: (best[index][0], -index))
        counts = (*counts[:index], best[index][1], *counts[index + 1 :])
        yield counts
        for other in prices.neighbours[index]:
            found = step(other)
            if found is None:
                best.pop(other, None)
            else:
                best[other] = found
