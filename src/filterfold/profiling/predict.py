"""What a network costs after a plan, without surgery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from ..plan import DROPPED, Plan, Slice
from .macs import Cost, LayerCost


def predict(plan: Plan, cost: Cost) -> Cost:
    """The cost of the network after a plan, without surgery.

    **Arguments:**

    - `plan`: of the network that `cost` was measured on.
    - `cost`: what `filterfold.profiling.macs.measure` gave.

    **Returns:** the new `Cost`; exact where weights are used whole. MACs between activations, and
    weights used in parts or repeated, are taken as unchanged.

    ```python
    >>> import torch
    >>> from filterfold.profiling.macs import measure
    >>> from filterfold.plan import Cut
    >>> cost = measure(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 5, 5))
    >>> part = Slice("weight", 0, (0, 1, 2, 3), "filter")
    >>> predict(Plan((Cut("", (-1, 0, -1, -1), (part,), ()),)), cost).macs, cost.macs
    (75, 300)

    ```
    """
    return shrunk(cost, removed_positions(plan))


def removed_positions(plan: Plan) -> dict[tuple[str, int], int]:
    """How many positions a plan removes along axes of tensors: (tensor, axis) → number."""
    removed: dict[tuple[str, int], int] = {}
    for cut in plan.cuts:
        assignment = np.asarray(cut.assignment)
        stays = assignment != DROPPED
        known: dict[int, int] = {}  # most slices of a group share one vector
        for key, units in axes(cut.producers, cut.consumers).items():
            if id(units) not in known:
                positions = np.asarray(per_unit(units, cut.size))
                kept = np.zeros(cut.new_size, np.int64)
                np.maximum.at(kept, assignment[stays], positions[stays])
                known[id(units)] = int(positions.sum() - kept.sum())
            removed[key] = removed.get(key, 0) + known[id(units)]
    return removed


def axes(producers: Iterable[Slice], consumers: Iterable[Slice]) -> dict[tuple[str, int], tuple[int, ...]]:
    """One label vector per tensor and axis: a slice may be listed on both sides."""
    return {(part.tensor, part.axis): part.units for part in (*producers, *consumers)}


def per_unit(units: Iterable[int], size: int) -> list[int]:
    """How many positions each unit has."""
    found = np.asarray(units if isinstance(units, tuple) else tuple(units), dtype=np.int64)
    return list(np.bincount(found[found >= 0], minlength=size).tolist())


def shrunk(cost: Cost, removed: Mapping[tuple[str, int], int]) -> Cost:
    """The cost after so many positions were removed along so many axes."""
    shapes = dict(cost.shapes)
    buffers = {layer.tensor: layer.shape for layer in cost.layers if layer.tensor not in shapes}
    after = shapes | buffers
    for (tensor, axis), count in removed.items():
        if count and tensor in after:
            shape = list(after[tensor])
            shape[axis] -= count
            after[tensor] = tuple(shape)

    def layer(old: LayerCost) -> LayerCost:
        if old.shape != shapes.get(old.tensor, old.shape):
            return old  # used in parts: which of them are cut is not known here
        shape = after[old.tensor]
        weights = prod(shape)
        return replace(old, shape=shape, macs=weights * old.uses, weights=weights)

    layers = tuple(layer(old) for old in cost.layers)
    used = {old.tensor for old in layers}
    return replace(
        cost,
        macs=sum(new.macs for new in layers),
        parameters=sum(prod(after[name]) for name in shapes),
        weights=sum(prod(after[name]) for name in shapes if name in used),
        layers=layers,
        shapes={name: after[name] for name in shapes},
    )
