"""Networks of the old size that must compute what the cut one computes: what verification compares with.

`masked` imposes a plan on the uncut network: consumers of dropped units are zero, and every unit of
a fold is made like the folded one, with its consumers times its gain. `emptied` makes dropped units zero at
their source, and leaves alone what reads them. `permuted` shuffles units that the plan holds to be
interchangeable. None shares any index arithmetic with surgery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..plan import DROPPED, Cut, Plan, Slice
from ..utils.arguments import typed
from ..utils.modules import named_tensors, unwrap
from .index_maps import Edit
from .weight_norms import NormedWeight, normed_weights

Places = np.ndarray[Any, np.dtype[np.bool_]]


_LARGE = 1 << 22
"""Elements from which on memory is so slow to get that writing in place is faster than copying."""


@typed
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
    for cut in plan.cuts:
        for part in (*cut.producers, *cut.consumers):
            if part.tensor not in tensors or tuple(tensors[part.tensor].shape[part.axis :][:1]) != (len(part.units),):
                raise PlanError(f"{part.tensor} is not as the plan of group {cut.group!r} has it: of another model?")
    memory = Counter(_address(tensor) for tensor in {id(tensor): tensor for tensor in tensors.values()}.values())
    norms = {norm.weight: norm for norm in normed_weights(unwrap(model), _touched(plan.cuts))}
    estimates = _Estimates(norms.values(), tensors)
    with _Replacements() as replacements:
        for cut in plan.cuts:
            blends = cut.folds or cut.blend or any(part.weight for part in cut.producers)
            for part in _once(cut.producers, tensors) if blends else ():
                replacements.replace(tensors[part.tensor], _blended(tensors[part.tensor], part, cut))
            for part in _once(cut.consumers, tensors):
                tensor, factor = tensors[part.tensor], _factors(part, cut)
                norm = norms.get(part.tensor)
                if norm is not None and norm.left is None:
                    gain, before = tensors[norm.target], norm.length(tensors)
                    if part.axis == norm.dim:  # where each position has a gain of its own
                        replacements.replace(gain, _scaled(gain, part.axis, factor))
                        continue
                    replacements.replace(tensor, _scaled(tensor, part.axis, factor))
                    replacements.replace(gain, gain.data * norm.factor(before, norm.length(tensors)))
                elif _in_place(tensor.data, memory[_address(tensor)]) and ((factor == 0) | (factor == 1)).all():
                    replacements.zero(tensor, part.axis, factor == 0)
                else:
                    replacements.replace(tensor, _scaled(tensor, part.axis, factor))
        estimates.keep(replacements)
        yield


@contextmanager
def emptied(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[None]:
    """Make the dropped units zero at their source, for the length of a `with` block.

    Whatever makes them is zero: filters, biases, norms. Nothing that reads them changes. Where zeros stay zeros on the
    way, the network then computes what it computes without these units, unless some number depends on how many there
    are: the temperature of an attention, the length of a kernel.

    >>> from filterfold.plan import Cut, Slice
    >>> net = nn.Linear(2, 3)
    >>> with emptied(net, [Cut("0", (0, -1, 1), (Slice("bias", 0, (0, 1, 2), "bias"),), ())]):
    ...     bool(net.bias[1] == 0), bool(net.bias[0] == 0)
    (True, False)
    """
    tensors = dict(named_tensors(unwrap(model)))
    norms = list(normed_weights(unwrap(model), _touched(cuts)))
    directions = {norm.weight for norm in norms if norm.left is None}  # a length of zero would divide
    estimates = _Estimates(norms, tensors)
    with _Replacements() as replacements:
        for cut in cuts:
            for part in _once(cut.producers, tensors):
                if part.tensor not in directions:
                    data = tensors[part.tensor].data
                    gone = np.isin(np.asarray(part.units), np.flatnonzero(np.asarray(cut.assignment) == DROPPED))
                    places = torch.from_numpy(np.flatnonzero(gone)).to(data.device)
                    replacements.replace(tensors[part.tensor], data.index_fill(part.axis, places, 0))
        estimates.keep(replacements)
        yield


@contextmanager
def permuted(
    model: nn.Module, cuts: Sequence[Cut], kinds: Mapping[str, Sequence[object]], generator: torch.Generator
) -> Iterator[None]:
    """Shuffle the units of the cuts' groups among those of their kind, for the length of a `with` block.

    **Arguments:**

    - `cuts`: the groups, by their slices; their assignments play no part.
    - `kinds`: group name → one entry a unit; units with equal entries are interchangeable.
    """
    tensors = dict(named_tensors(unwrap(model)))
    with _Replacements() as replacements:
        for cut in cuts:
            order = np.asarray(_shuffled(kinds[cut.group], generator))
            for part in _once((*cut.producers, *cut.consumers), tensors):
                tensor = tensors[part.tensor]
                index = torch.from_numpy(_moved(part, order)).to(tensor.device)
                replacements.replace(tensor, tensor.data.index_select(part.axis, index))
        yield


def rebased(cuts: Sequence[Cut], edits: Mapping[str, Edit], tensors: Mapping[str, Tensor]) -> tuple[Cut, ...]:
    """The cuts as they read on a model to which other groups' `edits` were applied already: those moved positions."""
    by_id = {id(tensors[name]): edit for name, edit in edits.items()}

    def moved(part: Slice) -> Slice:
        tensor = tensors[part.tensor]
        edit = by_id.get(id(tensor), {}).get(part.axis % max(tensor.dim(), 1))
        return part if edit is None else replace(part, units=tuple(part.units[i] for i in edit.keep.tolist()))

    return tuple(
        replace(cut, producers=tuple(map(moved, cut.producers)), consumers=tuple(map(moved, cut.consumers)))
        for cut in cuts
    )


class _Replacements:
    """Tensors with other data of the same shape, or with zeros in places, for the length of a `with` block."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._zeroed: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def __enter__(self) -> _Replacements:
        return self

    def __exit__(self, *_: object) -> None:
        for tensor, data in self._before.values():
            tensor.data = data
        while self._zeroed:  # backwards, since places may have been zeroed twice
            view, axis, places, values = self._zeroed.pop()
            view.index_copy_(axis, places, values)

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Give a tensor other data."""
        self._before.setdefault(id(tensor), (tensor, tensor.data))
        tensor.data = data

    def zero(self, tensor: Tensor, axis: int, gone: Places) -> None:
        """Set positions along an axis to zero, in the tensor's own memory."""
        # In as large pieces as possible: blocks of positions that are all zeroed or all left.
        block = int(np.gcd.reduce([len(gone), *(np.flatnonzero(np.diff(gone)) + 1)]))
        axis %= tensor.dim()
        places = torch.from_numpy(np.flatnonzero(gone[::block]))
        view = tensor.data.view(*tensor.shape[:axis], -1, block, *tensor.shape[axis + 1 :])
        self._zeroed.append((view, axis, places, view.index_select(axis, places)))
        view.index_fill_(axis, places, 0)


class _Estimates:
    """The largest singular values that spectral norms divide by: as they are now, to be kept when weights change."""

    def __init__(self, norms: Iterable[NormedWeight], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._before = [(norm, norm.length(tensors)) for norm in norms if norm.left is not None]

    def keep(self, replacements: _Replacements) -> None:
        for norm, before in self._before:
            vector = self._tensors[norm.target]
            replacements.replace(vector, vector.data * norm.factor(before, norm.length(self._tensors)))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _in_place(data: Tensor, users: int) -> bool:
    """Whether to write into a tensor's own memory: it is large, and nothing else reads it."""
    alone = users == 1 and data.is_contiguous() and data.untyped_storage().nbytes() == data.nbytes
    if data.numel() < _LARGE or data.device.type != "cpu" or not alone:
        return False
    return not data.is_shared()  # type: ignore[no-untyped-call]


def _touched(cuts: Iterable[Cut]) -> set[str]:
    return {part.tensor for cut in cuts for part in (*cut.producers, *cut.consumers)}


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


def _blended(tensor: Tensor, part: Slice, cut: Cut) -> Tensor:
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


def _factors(part: Slice, cut: Cut) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Kernels that read a dropped unit are multiplied by zero, the others by their unit's gain."""
    units, gain = np.asarray(part.units), np.asarray(part.weight or cut.gain or np.ones(cut.size))
    unit_factor = np.where(np.asarray(cut.assignment) == DROPPED, 0.0, gain)
    return np.where(units >= 0, unit_factor[units], 1.0)


def _scaled(tensor: Tensor, axis: int, factor: np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
    data = tensor.data
    if (factor == 1).all():
        return data
    shape = [-1 if place == axis % data.dim() else 1 for place in range(data.dim())]
    return data * torch.from_numpy(factor).to(tensor.device, tensor.dtype).view(shape)


def _shuffled(kinds: Sequence[object], generator: torch.Generator) -> list[int]:
    """An order of the units in which each has the place of one of its kind."""
    order = list(range(len(kinds)))
    by_kind: dict[object, list[int]] = {}
    for unit, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(unit)
    for units in by_kind.values():
        turn = torch.randperm(len(units), generator=generator).tolist()
        for unit, index in zip(units, turn, strict=True):
            order[unit] = units[index]
    return order
