"""What a network takes for any numbers of kept units: units, multiply-accumulates and parameters, from tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from math import prod
from typing import Protocol

from ...profiling.macs import Cost
from ...profiling.predict import axes, per_unit
from .ranking import RankedGroup

Counts = tuple[int, ...]
"""Kept units, one entry for each group."""


class Prices(Protocol):
    """What the search for widths asks: the full widths, and what narrowing one group saves.

    `neighbours` lists for each group those, itself among them, whose savings change when its width does.
    """

    @property
    def full(self) -> Counts:
        """Kept units before anything is removed."""

    @property
    def neighbours(self) -> Sequence[Collection[int]]:
        """Group → groups."""

    def saved(self, counts: Counts, index: int, fewer: int) -> float:
        """What is saved if one group keeps fewer units, the others keep `counts`."""


class RemovedPositions:
    """For every tensor that the groups lie on: the axes, and how many positions go for any number of kept units."""

    def __init__(self, ranked: Sequence[RankedGroup]) -> None:
        self.of: dict[str, list[tuple[int, int, list[int]]]] = {}
        for index, entry in enumerate(ranked):
            for (tensor, axis), units in axes(entry.group.producers, entry.group.consumers).items():
                positions = per_unit(units, entry.group.size)
                total = sum(positions)
                removed = [total - kept for kept in accumulate((positions[unit] for unit in entry.order), initial=0)]
                self.of.setdefault(tensor, []).append((axis, index, removed))

    def shape(self, tensor: str, full: Sequence[int], counts: Counts) -> list[int]:
        """The shape of a tensor with these numbers of units kept; axes that it lacks are passed over."""
        shape = list(full)
        for axis, index, removed in self.of.get(tensor, ()):
            if axis < len(shape):
                shape[axis] -= removed[counts[index]]
        return shape

    def groups(self, tensor: str) -> set[int]:
        """The groups that lie on a tensor."""
        return {index for _, index, _ in self.of.get(tensor, ())}


class SizePrices:
    """Units, multiply-accumulates and parameters; `saved` counts multiply-accumulates.

    The same numbers as `filterfold.profiling.predict`, without making plans.
    """

    def __init__(self, ranked: Sequence[RankedGroup], cost: Cost | None) -> None:
        self.full = tuple(entry.group.size for entry in ranked)
        self._cost = cost
        self._positions = RemovedPositions(ranked)
        self._uses: Counter[str] = Counter()
        self._shapes = dict(cost.shapes) if cost else {}
        for layer in cost.layers if cost else ():
            if layer.shape == self._shapes.get(layer.tensor, layer.shape):  # else used in parts: which are cut?
                self._uses[layer.tensor] += layer.uses
                self._shapes.setdefault(layer.tensor, layer.shape)
        self._touched: list[list[str]] = [[] for _ in ranked]
        for tensor in self._positions.of:
            if self._uses[tensor]:
                for index in self._positions.groups(tensor):
                    self._touched[index].append(tensor)
        self.neighbours = [
            {index}.union(*(self._positions.groups(tensor) for tensor in tensors))
            for index, tensors in enumerate(self._touched)
        ]

    def amounts(self, counts: Sequence[int]) -> dict[str, int]:
        """All of it, with these numbers of units kept."""
        counts = tuple(counts)
        amounts = {"units": sum(counts)}
        if self._cost is not None:
            amounts |= {"macs": self._cost.macs, "parameters": self._cost.parameters}
            for tensor in self._positions.of:
                full = self._shapes.get(tensor)
                if full is not None:
                    fewer = prod(full) - prod(self._positions.shape(tensor, full, counts))
                    amounts["macs"] -= self._uses[tensor] * fewer
                    amounts["parameters"] -= fewer if tensor in self._cost.shapes else 0
        return amounts

    def saved(self, counts: Counts, index: int, fewer: int) -> int:
        """Multiply-accumulates saved if one group keeps fewer units."""
        after = (*counts[:index], fewer, *counts[index + 1 :])
        return sum(
            self._uses[tensor] * (self._size(tensor, counts) - self._size(tensor, after))
            for tensor in self._touched[index]
        )

    def _size(self, tensor: str, counts: Counts) -> int:
        return prod(self._positions.shape(tensor, self._shapes[tensor], counts))
