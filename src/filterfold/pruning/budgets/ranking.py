"""One group: the order in which its units are wanted, and the numbers of them that it may keep."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import torch
from torch import Tensor

from ...errors import SelectionError
from ...plan import ChannelGroup, Cut, keep_units


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """A group with the order in which its units are wanted, and how many of them it may keep."""

    group: ChannelGroup
    scores: tuple[float, ...]
    order: tuple[int, ...]
    allowed: tuple[int, ...]

    def nearest(self, count: int) -> int:
        """The allowed number of units that is nearest to `count`, the smaller of two."""
        above = bisect_left(self.allowed, count)
        if above == len(self.allowed):
            return self.allowed[-1]
        below = max(0, above - 1)
        return min(self.allowed[below], self.allowed[above], key=lambda allowed: (abs(allowed - count), allowed))

    def more(self, count: int) -> int:
        """The next allowed number of units above `count`, or `count` if there is none."""
        above = bisect_right(self.allowed, count)
        return self.allowed[above] if above < len(self.allowed) else count

    def cut(self, count: int) -> Cut:
        """Keep the first `count` units of the order."""
        assignment = keep_units(self.group.size, self.order[:count])
        return Cut(self.group.name, assignment, self.group.producers, self.group.consumers)


def rank(group: ChannelGroup, scores: Mapping[str, Tensor], round_to: int, min_keep: int) -> RankedGroup:
    """Order a group's units by score, within what its classes and blocks demand."""
    if group.name not in scores:
        raise SelectionError(f"group {group.name!r} has no scores; score all groups that are to be cut")
    values = scores[group.name].detach().double().cpu()
    if values.shape != (group.size,):
        raise SelectionError(f"group {group.name!r}: scores of shape {tuple(values.shape)} for {group.size} units")
    if not bool(torch.isfinite(values).all()):
        raise SelectionError(f"group {group.name!r}: scores are not finite; look for NaN or inf in its weights")
    listed = tuple(values.tolist())
    if round_to == 1 and len(set(group.blocks)) == len(set(group.classes)) == 1:
        wanted = torch.argsort(values, descending=True, stable=True).tolist()
        return RankedGroup(
            group, listed, tuple(wanted), (*range(min(group.size, max(min_keep, 1)), group.size), group.size)
        )
    blocks: dict[int, list[int]] = {}
    for unit, block in enumerate(group.blocks):
        blocks.setdefault(block, []).append(unit)
    if len({len(members) for members in blocks.values()}) != 1:
        raise SelectionError(f"group {group.name!r}: its blocks differ in size, so they can't keep the same number")
    step = lcm(round_to, len(blocks))
    ordered = [_order_block(group, members, listed, step // len(blocks)) for members in blocks.values()]
    order = tuple(unit for row in zip(*(units for units, _ in ordered), strict=True) for unit in row)
    floor = min(group.size, max(min_keep, len(blocks) * max(least for _, least in ordered)))
    first = -(-floor // step) * step
    return RankedGroup(group, listed, order, (*range(first, group.size, step), group.size))


def _order_block(
    group: ChannelGroup, members: Sequence[int], scores: Sequence[float], chunk: int
) -> tuple[list[int], int]:
    """Units from most to least wanted, and how many of them are needed for one (chunk) of each class.

    Classes take turns by Webster's method (the largest `size / (2·kept + 1)`), in chunks: the share
    of a class never falls when the number of units grows.
    """
    classes: dict[int, list[int]] = {}
    for unit in members:
        classes.setdefault(group.classes[unit], []).append(unit)
    queues = [sorted(units, key=lambda unit: -scores[unit]) for units in classes.values()]  # stable
    if len(queues) == 1:
        return queues[0], min(chunk, len(members))
    order = [unit for queue in queues for unit in queue[:chunk]]
    least = len(order)
    taken = [min(chunk, len(queue)) for queue in queues]
    while len(order) < len(members):
        left = [index for index, queue in enumerate(queues) if taken[index] < len(queue)]
        turn = max(left, key=lambda index: (Fraction(len(queues[index]), 2 * taken[index] + chunk), -index))
        order += queues[turn][taken[turn] : taken[turn] + chunk]
        taken[turn] += chunk
    return order, least
