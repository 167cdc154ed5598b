"""What a plan means for each tensor: pure index arithmetic, nothing is touched.

`edits_of` turns a plan into one `AxisCut` for every (tensor, axis) that changes; `cut_tensor` applies
them to a tensor, or to anything of its shape: a gradient, a momentum. The new unit lies where the
lowest of the units folded into it lay, on every axis, so a fold moves positions exactly as dropping
all but that unit would; after a pure drop an axis is simply the old one with positions removed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PlanError, SurgeryError
from .plan import DROPPED, Cut, Plan, Slice

Kind = Literal["value", "variance", "moment"]
"""How a folded tensor combines: like parameters, like a running variance, like a second moment."""


@dataclass(frozen=True, slots=True)
class AxisCut:
    """What one axis of one tensor becomes: first `keep` is selected, then `target`s are recomputed as weighted sums.

    `source[i]` (old position) goes into `target[i]` (new position) with `weight[i]`.
    """

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
    first = np.full(cut.new_size, -1)
    for unit in range(cut.size - 1, -1, -1):
        if new[unit] != DROPPED:
            first[new[unit]] = unit
    return np.where(new == DROPPED, -1, first[new])


@dataclass(frozen=True, slots=True)
class _Part:
    """One slice of one cut, ready for `_axis`."""

    cut: Cut
    part: Slice
    producer: bool


def _axis(name: str, length: int, parts: Sequence[_Part]) -> AxisCut | None:
    """Combine all slices along one axis of one tensor; None where nothing changes."""
    owner = np.full(length, -1)  # index of the slice that owns the position
    home = np.arange(length)  # old position in whose place it ends up; -1 = dropped
    weight = np.ones(length)
    for index, entry in enumerate(parts):
        units = np.asarray(entry.part.units)
        if len(units) != length:
            raise PlanError(
                f"group {entry.cut.group!r}: {name} has {length} positions along axis {entry.part.axis}, "
                f"the plan {len(units)}: was it made for another model?"
            )
        own = np.flatnonzero(units >= 0)
        _refuse_overlap(name, parts, owner[own], entry)
        owner[own] = index
        home[own] = _homes(name, entry, units, own)
        shares = unit_weights(entry.cut, producer=entry.producer, own=entry.part.weight)
        weight[own] = shares[units[own]]
    keep = np.flatnonzero(home == np.arange(length))
    place = np.full(length, -1)
    place[keep] = np.arange(len(keep))
    target = np.where(home >= 0, place[home], -1)
    folded = np.bincount(target[target >= 0], minlength=len(keep)) > 1
    mixed = folded | (weight[keep] != 1)
    source = np.flatnonzero((target >= 0) & mixed[target])
    if len(keep) == length and len(source) == 0:
        return None
    return AxisCut(*(torch.from_numpy(array) for array in (keep, source, target[source], weight[source])))


def _homes(name: str, entry: _Part, units: Any, own: Any) -> Any:
    """For each position in `own` the old position in whose place it ends up, the i-th of a unit with the i-th."""
    order = own[np.argsort(units[own], kind="stable")]
    counts = np.bincount(units[own], minlength=entry.cut.size)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.empty(len(units), dtype=np.int64)
    rank[order] = np.arange(len(order)) - starts[units[order]]
    representative = representatives(entry.cut)
    kept = np.flatnonzero(representative >= 0)
    uneven = kept[counts[kept] != counts[representative[kept]]]
    if len(uneven):
        unit = int(uneven[0])
        other = int(representative[unit])
        raise SurgeryError(
            f"group {entry.cut.group!r}: units {other} and {unit} can't be folded: they hold {counts[other]} and "
            f"{counts[unit]} positions of {name}"
        )
    home = representative[units[own]]
    inside = np.clip(starts[home] + rank[own], 0, len(order) - 1)
    return np.where(home >= 0, order[inside], -1)


def _refuse_overlap(name: str, parts: Sequence[_Part], owners: Any, entry: _Part) -> None:
    taken = owners[owners >= 0]
    if len(taken):
        other = parts[int(taken[0])].cut.group
        raise PlanError(f"{name}: groups {other!r} and {entry.cut.group!r} both claim the same positions")


Edit = dict[int, AxisCut]
"""What one tensor goes through: axis → what becomes of it."""


def edits_of(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """For every tensor (under one of its names) that changes, what becomes of its axes."""
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_name.setdefault(id(tensor), name)
    parts: dict[tuple[str, int], list[_Part]] = {}
    for cut in plan.cuts:
        weighted = any(part.weight is not None for part in (*cut.producers, *cut.consumers))
        if not cut.changes and cut.blend is None and cut.gain is None and not weighted:
            continue
        for producer, slices in ((True, cut.producers), (False, cut.consumers)):
            for part in slices:
                name = first_name[id(_tensor(tensors, part.tensor, cut.group))]
                axis = part.axis % max(tensors[name].dim(), 1)
                entries = parts.setdefault((name, axis), [])
                if not any(e.cut is cut and e.part.units == part.units for e in entries):
                    entries.append(_Part(cut, part, producer))
    edits: dict[str, Edit] = {}
    for (name, axis), entries in parts.items():
        found = _axis(name, tensors[name].shape[axis], entries)
        if found is not None:
            edits.setdefault(name, {})[axis] = found
    return edits


def _tensor(tensors: Mapping[str, Tensor], name: str, group: str) -> Tensor:
    if name not in tensors:
        close = difflib.get_close_matches(name, tensors, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"group {group!r}: the model has no tensor {name!r}{hint}")
    tensor = tensors[name]
    if tensor.is_inference():
        raise SurgeryError(f"{name} was made under inference_mode and can't be changed: build the model outside of it")
    if isinstance(tensor, nn.UninitializedParameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise SurgeryError(f"{name} is not an ordinary dense tensor with data; run the model once before cutting it")
    return tensor


def cut_tensor(tensor: Tensor, edit: Edit, kind: Kind = "value") -> Tensor:
    """The tensor after all its axes are cut, in its old order in memory (channels_last stays channels_last)."""
    result = tensor.detach()
    for axis, found in edit.items():
        # Adafactor keeps factors of size 1 along the axes that it averages over: nothing to cut there.
        if tensor.shape[axis] == 1 and int(found.keep.max()) > 0:
            continue
        result = found.apply(result, axis, kind)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    # clone, since contiguous() leaves the strides of axes of size 1 alone and kernels dispatch on them
    ordered = result.permute(order).clone(memory_format=torch.contiguous_format)
    return ordered.permute(sorted(range(len(order)), key=order.__getitem__))
