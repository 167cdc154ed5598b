"""What becomes of every axis of every tensor under a plan: index arithmetic only, nothing is changed here.

`edits_of` turns a plan into one `AxisCut` for every (tensor, axis) that changes; `cut_tensor` applies
them to a tensor, or to anything of its shape: a gradient, a momentum.

An axis may hold several positions of one unit (a flattened feature map has one for each pixel), and slices of several
groups (a concatenation). So everything is computed per position. Units that are folded together end up where the
lowest of them lay, the i-th position of each with the i-th of that one; a fold therefore keeps the same positions as a
drop of all but the lowest unit would, and what stays keeps its order.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanError, SurgeryError
from ..plan import DROPPED, Cut, Plan, Slice
from ..utils.modules import memory_order

Kind = Literal["value", "variance", "moment"]
"""How a folded tensor combines: like parameters, like a running variance, like a second moment."""


_LARGE, _WIDE = 1 << 20, 16
"""From so many elements on it pays to look for blocks; from so many elements in a row on, to select both axes at once
(measured: a 4096 by 25088 matrix takes .07 s instead of .17 s)."""


@dataclass(frozen=True, slots=True)
class AxisCut:
    """What one axis of one tensor becomes: first `keep` is selected, then `target`s are recomputed as weighted sums.

    `length` is the old number of positions; `source[i]` (old position) goes into `target[i]` (new
    position) with `weight[i]`.
    """

    length: int
    keep: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor

    def apply(self, tensor: Tensor, axis: int, kind: Kind) -> Tensor:
        """The tensor after the cut; sums are taken in float64 so that folding equal rows is exact."""
        device = tensor.device
        result = tensor.index_select(axis, self.keep.to(device))
        if len(self.source) == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            return result
        targets, slot = torch.unique(self.target, return_inverse=True)
        exact = torch.complex128 if tensor.is_complex() else torch.float64
        exact = tensor.dtype if device.type == "mps" else exact
        weight = _weights(self.weight, slot, len(targets), kind).to(device, exact)
        shape = [-1 if dim == axis else 1 for dim in range(tensor.dim())]
        rows = tensor.index_select(axis, self.source.to(device)).to(exact) * weight.view(shape)
        size = [len(targets) if dim == axis else length for dim, length in enumerate(tensor.shape)]
        total = torch.zeros(size, dtype=exact, device=device).index_add_(axis, slot.to(device), rows)
        return result.index_copy_(axis, targets.to(device), total.to(tensor.dtype))


def _weights(weight: Tensor, slot: Tensor, count: int, kind: Kind) -> Tensor:
    """The weights of a sum by kind: as they are for values; for moments their sizes, scaled to a mean; for variances
    that mean times (Σ weight)², as Var(a·x) = a²·Var(x).
    """
    if kind == "value":
        return weight
    size = torch.zeros(count, dtype=weight.dtype).index_add_(0, slot, weight.abs())
    mean = weight.abs() / size.clamp_min(torch.finfo(weight.dtype).tiny)[slot]
    if kind == "moment":
        return mean
    total = torch.zeros(count, dtype=weight.dtype).index_add_(0, slot, weight)
    return mean * total.square()[slot]


def unit_weights(
    cut: Cut, *, producer: bool, own: Sequence[float] | None = None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """For every unit its factor in the sum over the units folded with it; 0 for dropped units.

    Producers: `blend`, by default one over the number of units folded together; consumers: `gain`, by default 1.
    A slice's `own` weight goes before both.

    >>> cut = Cut("conv", (0, 0, -1, 1), (), ())
    >>> unit_weights(cut, producer=True).tolist(), unit_weights(cut, producer=False).tolist()
    ([0.5, 0.5, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    """
    new = np.asarray(cut.assignment)
    given = own if own is not None else cut.blend if producer else cut.gain
    if given is not None:
        weights = np.asarray(given, dtype=np.float64)
    elif producer:
        weights = 1.0 / np.bincount(new[new != DROPPED])[new]
    else:
        weights = np.ones(len(new))
    return np.where(new == DROPPED, 0.0, weights)


def representatives(cut: Cut) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every unit the lowest unit that is folded with it, in whose place the new unit lies; -1 if dropped.

    >>> representatives(Cut("conv", (0, 1, -1, 0), (), ())).tolist()
    [0, 1, -1, 0]
    """
    new = np.asarray(cut.assignment)
    index, first = np.unique(new, return_index=True)
    return np.where(new == DROPPED, -1, first[np.searchsorted(index, new)])


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A cut as arrays, made once for its many slices; `plain`: units are only dropped, no sum is ever taken."""

    cut: Cut
    representative: Any
    plain: bool
    arrays: dict[int, tuple[Any, Any]]

    @classmethod
    def of(cls, cut: Cut) -> _Prepared:
        weighted = any(part.weight is not None for part in (*cut.producers, *cut.consumers))
        plain = not weighted and not cut.folds and cut.blend is None and cut.gain is None
        return cls(cut, representatives(cut), plain, {})

    @property
    def changes(self) -> bool:
        return self.cut.changes or not self.plain

    def units(self, part: Slice) -> Any:
        """A slice's units as an array; most slices of a cut share one tuple."""
        if id(part.units) not in self.arrays:
            self.arrays[id(part.units)] = (part.units, np.asarray(part.units))
        return self.arrays[id(part.units)][1]


@dataclass(frozen=True, slots=True)
class _Part:
    """One slice of one cut, ready for `_axis`."""

    of: _Prepared
    part: Slice
    producer: bool


def _axis(name: str, length: int, parts: Sequence[_Part]) -> AxisCut | None:
    """Combine all slices along one axis of one tensor; None where nothing changes."""
    home = np.arange(length)  # per old position the old position in whose place it ends up; -1 = dropped
    weight = np.ones(length)  # per old position its factor in the sum that is taken there
    owner = np.full(length, -1)  # per position the index of the slice that claims it
    for index, entry in enumerate(parts):
        units = entry.of.units(entry.part)
        if len(units) != length:
            raise PlanError(
                f"group {entry.of.cut.group!r}: {name} has {length} positions along axis {entry.part.axis}, "
                f"the plan {len(units)}: was it made for another model?"
            )
        own = np.flatnonzero(units >= 0)
        unit = units[own]
        _refuse_overlap(name, parts, owner[own], entry)
        owner[own] = index
        if entry.of.plain:
            home[own] = np.where(entry.of.representative[unit] >= 0, own, -1)
        else:
            home[own] = _homes(name, entry, unit, own)
            weight[own] = unit_weights(entry.of.cut, producer=entry.producer, own=entry.part.weight)[unit]
    keep = np.flatnonzero(home == np.arange(length))
    if len(keep) == 0:
        raise PlanError(f"{name}: the plan would leave nothing along axis {parts[0].part.axis}; keep a unit of it")
    # From here on new positions: the kept ones, counted. Only where something is folded or scaled is a sum needed.
    target = np.full(length, -1)
    source = np.empty(0, dtype=np.int64)
    if not all(entry.of.plain for entry in parts):
        place = np.full(length, -1)
        place[keep] = np.arange(len(keep))
        target = np.where(home >= 0, place[home], -1)
        folded = np.bincount(target[target >= 0], minlength=len(keep)) > 1
        summed = folded | (weight[keep] != 1)
        source = np.flatnonzero((target >= 0) & summed[target])
    if len(keep) == length and len(source) == 0:
        return None
    return AxisCut(length, *map(torch.from_numpy, (keep, source, target[source], weight[source])))


def _homes(name: str, entry: _Part, unit: Any, own: Any) -> Any:
    """For each position in `own` the old position in whose place it ends up, the i-th of a unit with the i-th."""
    counts = np.bincount(unit, minlength=entry.of.cut.size)
    representative = entry.of.representative
    kept = np.flatnonzero(representative >= 0)
    uneven = kept[counts[kept] != counts[representative[kept]]]
    if len(uneven):
        one = int(uneven[0])
        other = int(representative[one])
        raise SurgeryError(
            f"group {entry.of.cut.group!r}: units {other} and {one} can't be folded: they hold {counts[other]} and "
            f"{counts[one]} positions of {name}"
        )
    # Sort the positions by unit: those of unit u are then the entries from starts[u] on, and `rank` numbers them.
    by_unit = np.argsort(unit, kind="stable")
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.empty(len(own), dtype=np.int64)
    rank[by_unit] = np.arange(len(own)) - starts[unit[by_unit]]
    home = representative[unit]
    entries = np.clip(starts[home] + rank, 0, len(own) - 1)  # those of dropped units mean nothing, but must be indices
    return np.where(home >= 0, own[by_unit][entries], -1)


def _refuse_overlap(name: str, parts: Sequence[_Part], owners: Any, entry: _Part) -> None:
    taken = owners[owners >= 0]
    if len(taken):
        other = parts[int(taken[0])].of.cut.group
        raise PlanError(f"{name}: groups {other!r} and {entry.of.cut.group!r} both claim the same positions")


Edit = dict[int, AxisCut]
"""What becomes of one tensor: axis → its `AxisCut`."""


def edits_of(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """For every tensor (under one of its names) that changes, what becomes of its axes."""
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_name.setdefault(id(tensor), name)
    parts: dict[tuple[str, int], list[_Part]] = {}
    for cut in plan.cuts:
        prepared = _Prepared.of(cut)
        if not prepared.changes:
            continue
        for producer, slices in ((True, cut.producers), (False, cut.consumers)):
            for part in slices:
                name = first_name[id(_tensor(tensors, part.tensor, cut.group))]
                axis = _axis_of(part, tensors[name].dim())
                entries = parts.setdefault((name, axis), [])
                if not any(e.of is prepared and e.part.units == part.units for e in entries):
                    entries.append(_Part(prepared, part, producer))
    edits: dict[str, Edit] = {}
    known: dict[tuple[int, int, int], AxisCut | None] = {}
    for (name, axis), entries in parts.items():
        length, entry = tensors[name].shape[axis], entries[0]
        if len(entries) == 1 and entry.of.plain:  # most slices of a cut share one tuple of units
            key = id(entry.of), id(entry.part.units), length
            if key not in known:
                known[key] = _axis(name, length, entries)
            found = known[key]
        else:
            found = _axis(name, length, entries)
        if found is not None:
            edits.setdefault(name, {})[axis] = found
    return edits


def _tensor(tensors: Mapping[str, Tensor], name: str, group: str) -> Tensor:
    if name not in tensors:
        close = difflib.get_close_matches(name, tensors, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"group {group!r}: the model has no tensor {name!r}{hint}")
    tensor = tensors[name]
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise SurgeryError(f"{name} is not an ordinary dense tensor with data; run the model once before cutting it")
    if tensor.is_inference():
        raise SurgeryError(f"{name} was made under inference_mode and can't be changed: build the model outside of it")
    return tensor


def _axis_of(part: Slice, dims: int) -> int:
    if not -dims <= part.axis < dims:
        raise PlanError(
            f"{part.tensor} has {dims} axes, the plan cuts axis {part.axis}: was it made for another model?"
        )
    return part.axis % dims


def cut_tensor(tensor: Tensor, edit: Edit, kind: Kind = "value") -> Tensor:
    """The tensor after all its axes are cut, in its old order in memory (channels_last stays channels_last)."""
    order = memory_order(tensor)
    result = tensor.detach().permute(order)  # what is computed from this is contiguous: nothing is copied twice
    # Adafactor keeps factors of size 1 along the axes that it averages over: nothing to cut there.
    found = {
        place: edit[axis]
        for place, axis in enumerate(order)
        if axis in edit and tensor.shape[axis] == edit[axis].length
    }
    if not found:
        result = result.clone(memory_format=torch.contiguous_format)
    elif any(len(cut.source) for cut in found.values()):
        for axis, cut in found.items():
            result = cut.apply(result, axis, kind)
    else:
        result = _selected(result, {axis: cut.keep for axis, cut in found.items()})
    return result.permute(sorted(range(len(order)), key=order.__getitem__))


def _selected(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """`index_select` along several axes; large tensors in as large pieces and as few copies as the indices allow."""
    if tensor.numel() < _LARGE:
        for axis, places in keep.items():
            tensor = tensor.index_select(axis, places.to(tensor.device))
        return tensor
    shape: list[int] = []
    picks: list[tuple[int, Tensor]] = []
    for axis, size in enumerate(tensor.shape):
        run = 1
        if axis in keep:
            run = _run(keep[axis].numpy(), size)
            picks.append((len(shape), (keep[axis][::run] // run).to(tensor.device)))
        shape += [size // run, run] if run > 1 else [size]
    result = tensor.reshape(shape)
    if len(picks) == 2 and picks[0][0] + 1 == picks[1][0] and prod(shape[picks[1][0] + 1 :]) >= _WIDE:
        before: list[Any] = [slice(None)] * picks[0][0]
        result = result[(*before, picks[0][1][:, None], picks[1][1])]
    else:
        for axis, places in picks:
            result = result.index_select(axis, places)
    return result.reshape([len(keep[axis]) if axis in keep else size for axis, size in enumerate(tensor.shape)])


def _run(places: np.ndarray[Any, np.dtype[np.int64]], size: int) -> int:
    """The length of the aligned blocks that an axis can be divided into, so that each is kept or dropped as a whole.

    >>> _run(np.array([0, 1, 4, 5, 6, 7]), 8)
    2
    """
    after_gap = np.flatnonzero(np.diff(places) != 1) + 1
    bounds = (places[after_gap], places[after_gap - 1] + 1, [size, places[0], places[-1] + 1])
    return int(np.gcd.reduce(np.concatenate(bounds)))
