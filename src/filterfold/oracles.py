"""The two oracles of verification: networks of the old size that must compute what the cut one computes.

`masked` imposes a plan on the uncut network: consumers of dropped units are zero, and every unit of
a fold is made like the folded one, with its consumers times its gain. `permuted` shuffles units that
the plan holds to be interchangeable. Neither shares any index arithmetic with surgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .axes import Edit
from .plan import DROPPED, Cut, Plan, Slice
from .structure import named_tensors, unwrap


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Impose a plan on a model without changing any size, for the length of a `with` block.

    Inside, the model computes exactly what it computes after `apply(plan, model)`, provided that the
    groups are exact: dropped units are read by zero kernels; units that are folded into one all have
    the folded unit's producers, and their consumers are multiplied by their gain.

    >>> from filterfold.plan import Cut, Plan, Slice
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> read = Slice("1.weight", 1, (0, 1, 2), "kernel")
    >>> with masked(net, Plan((Cut("0", (0, -1, 1), (), (read,)),))):
    ...     bool(net[1].weight[0, 1] == 0)
    True
    >>> bool(net[1].weight[0, 1] == 0)
    False
    """
    tensors = dict(named_tensors(unwrap(model)))
    with _replacing() as place:
        for cut in plan.cuts:
            blends = cut.folds or cut.blend or any(part.weight for part in cut.producers)
            for part in _once(cut.producers, tensors) if blends else ():
                place(tensors[part.tensor], _unified(tensors[part.tensor], part, cut))
            for part in _once(cut.consumers, tensors):
                place(tensors[part.tensor], _scaled(tensors[part.tensor], part, cut))
        yield


@contextmanager
def permuted(
    model: nn.Module, cuts: Sequence[Cut], cells: Mapping[str, Sequence[object]], generator: torch.Generator
) -> Iterator[None]:
    """Shuffle the units of the cuts' groups within their cells, for the length of a `with` block.

    **Arguments:**

    - `cuts`: the groups, by their slices; their assignments play no part.
    - `cells`: group name → one entry a unit; units with equal entries are interchangeable.
    """
    tensors = dict(named_tensors(unwrap(model)))
    with _replacing() as place:
        for cut in cuts:
            order = np.asarray(_shuffled(cells[cut.group], generator))
            for part in _once((*cut.producers, *cut.consumers), tensors):
                tensor = tensors[part.tensor]
                index = torch.from_numpy(_moved(part, order)).to(tensor.device)
                place(tensor, tensor.data.index_select(part.axis, index))
        yield


def rebased(cuts: Sequence[Cut], edits: Mapping[str, Edit], tensors: Mapping[str, Tensor]) -> tuple[Cut, ...]:
    """The cuts as they read on a model to which other groups' `edits` were applied already."""
    by_id = {id(tensors[name]): edit for name, edit in edits.items()}

    def moved(part: Slice) -> Slice:
        tensor = tensors[part.tensor]
        edit = by_id.get(id(tensor), {}).get(part.axis % max(tensor.dim(), 1))
        return part if edit is None else replace(part, units=tuple(part.units[i] for i in edit.keep.tolist()))

    return tuple(
        replace(cut, producers=tuple(map(moved, cut.producers)), consumers=tuple(map(moved, cut.consumers)))
        for cut in cuts
    )


@contextmanager
def _replacing() -> Iterator[_Replacer]:
    replacer = _Replacer()
    try:
        yield replacer
    finally:
        replacer.restore()


class _Replacer:
    """Gives tensors other data of the same shape; `restore` puts the first data back."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor, data: Tensor) -> None:
        self._before.setdefault(id(tensor), (tensor, tensor.data))
        tensor.data = data

    def restore(self) -> None:
        for tensor, data in self._before.values():
            tensor.data = data


def _once(parts: Sequence[Slice], tensors: Mapping[str, Tensor]) -> list[Slice]:
    """The slices without those that name a tied tensor a second time."""
    return list({(id(tensors[part.tensor]), part.axis, part.units): part for part in parts}.values())


def _positions(part: Slice) -> dict[int, list[int]]:
    positions: dict[int, list[int]] = {}
    for position, unit in enumerate(part.units):
        if unit >= 0:
            positions.setdefault(unit, []).append(position)
    return positions


def _moved(part: Slice, order: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every position the one whose content it gets, when unit u gets the content of unit `order[u]`."""
    units = np.asarray(part.units)
    index = np.arange(len(units))
    own = np.flatnonzero(units >= 0)
    taken = own[np.argsort(order[units[own]], kind="stable")]
    given = own[np.argsort(units[own], kind="stable")]
    if not np.array_equal(order[units[taken]], units[given]):
        raise ValueError(f"{part.tensor}: units that are to be interchangeable hold different numbers of positions")
    index[taken] = given
    return index


def _unified(tensor: Tensor, part: Slice, cut: Cut) -> Tensor:
    """Every unit's rows become the blended rows of the new unit that it ends up in."""
    data = tensor.data
    given = part.weight or cut.blend
    if not data.is_floating_point() or not (cut.folds or given):
        return data
    members: dict[int, list[int]] = {}
    for unit, new in enumerate(cut.assignment):
        if new != DROPPED:
            members.setdefault(new, []).append(unit)
    positions, result = _positions(part), data.clone()
    for units in members.values():
        weights = [given[unit] if given else 1 / len(units) for unit in units]
        if len(units) == 1 and weights == [1]:
            continue
        places = [torch.tensor(positions.get(unit, ()), dtype=torch.long, device=data.device) for unit in units]
        rows = [data.index_select(part.axis, place).double() for place in places]
        if part.tensor.rpartition(".")[2] == "running_var":
            total = sum(abs(weight) for weight in weights)
            weights = [sum(weights) ** 2 * abs(weight) / total if total else 0.0 for weight in weights]
        blended = torch.stack([row * weight for row, weight in zip(rows, weights, strict=True)]).sum(0)
        for place in places:
            result.index_copy_(part.axis, place, blended.to(data.dtype))
    return result


def _scaled(tensor: Tensor, part: Slice, cut: Cut) -> Tensor:
    """Kernels that read a dropped unit become zero, the others are multiplied by their unit's gain."""
    units, data = np.asarray(part.units), tensor.data
    own, gain = units >= 0, np.asarray(part.weight or cut.gain or np.ones(cut.size))
    unit_factor = np.where(np.asarray(cut.assignment) == DROPPED, 0.0, gain)
    factor = np.where(own, unit_factor[units], 1.0)
    if (factor == 1).all():
        return data
    shape = [-1 if axis == part.axis % data.dim() else 1 for axis in range(data.dim())]
    return data * torch.from_numpy(factor).to(tensor.device, tensor.dtype).view(shape)


def _shuffled(cells: Sequence[object], generator: torch.Generator) -> list[int]:
    order = list(range(len(cells)))
    by_cell: dict[object, list[int]] = {}
    for unit, cell in enumerate(cells):
        by_cell.setdefault(cell, []).append(unit)
    for units in by_cell.values():
        turn = torch.randperm(len(units), generator=generator).tolist()
        for unit, index in zip(units, turn, strict=True):
            order[unit] = units[index]
    return order
