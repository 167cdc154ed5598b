"""Which channels of the uncut network a cut network's channels stand for: for comparing feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, PlanError
from ..graph import Traced, trace
from ..graph.assemble import Assembly
from ..graph.dispatch import SizedLayout
from ..plan import DROPPED, Cut, Plan, Slice
from ..pruning.budgets.patterns import suggestion
from ..surgery.index_maps import edits_of

_FILTERS = "filter", "depthwise"

_Labelled = tuple[Slice, NDArray[np.int64], NDArray[np.int64]]


@dataclass(slots=True)
class ChannelMap:
    """How the uncut network's channels, along one axis of what a module returns, become the cut network's.

    New channel `slot[i]` is the sum over i of `weight[i]` times old channel `source[i]`.

    **Arguments:**

    - `axis`: the axis that holds the channels.
    - `tensor`, `along`: a parameter or buffer whose axis `along` holds the same units in the same order, so that
      what a plan does to it tells what happens to the channels; "" where they can't be cut.
    - `linear`: whether these are the module's own filters: a fold then makes of the channels what it makes of them.
    - `length`: number of channels of the cut network.
    - `source`, `slot`: shape `(n,)`, integers; `weight`: shape `(n,)`.
    """

    axis: int
    tensor: str
    along: int
    linear: bool
    length: int
    source: Tensor
    slot: Tensor
    weight: Tensor
    plain: bool = field(init=False)  # channels are only picked, in their order
    untouched: bool = field(init=False)  # not even that
    _there: tuple[Tensor, ...] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """What `of` asks for each batch, asked once."""
        self.plain = torch.equal(self.slot, torch.arange(self.length)) and bool((self.weight == 1).all())
        self.untouched = torch.equal(self.source, self.slot) and self.plain

    def follow(self, plan: Plan) -> ChannelMap:
        """The map after a further cut. Raises `PlanError` if the plan is of a network of another size."""
        cuts = [
            _alone(cut, part, self.linear)
            for cut in plan.cuts
            for part in (*cut.producers, *cut.consumers)
            if (part.tensor, part.axis) == (self.tensor, self.along)
        ]
        stub = torch.zeros(1).expand([1] * self.along + [self.length])  # only its shape counts
        edit = edits_of(Plan(tuple(cuts)), {self.tensor: stub}).get(self.tensor, {}).get(self.along) if cuts else None
        if edit is None:
            return self
        new, factor = torch.full((self.length,), DROPPED), torch.ones(self.length)
        new[edit.keep] = torch.arange(len(edit.keep))
        new[edit.source], factor[edit.source] = edit.target, edit.weight.float()
        slot = self.slot
        kept = new[slot] != DROPPED
        return replace(
            self,
            length=len(edit.keep),
            source=self.source[kept],
            slot=new[slot[kept]],
            weight=(self.weight * factor[slot])[kept],
        )

    def of(self, feature: Tensor) -> Tensor:
        """What the cut network's feature map should be, from the uncut network's."""
        if self._there is None or self._there[0].device != feature.device:
            self._there = tuple(part.to(feature.device) for part in (self.source, self.slot, self.weight))
        source, slot, weight = self._there
        rows = feature if self.untouched else feature.index_select(self.axis, source)
        if self.plain:
            return rows
        shape = [-1 if axis == self.axis else 1 for axis in range(feature.dim())]
        size = [self.length if axis == self.axis else count for axis, count in enumerate(feature.shape)]
        return rows.new_zeros(size).index_add_(self.axis, slot, rows * weight.to(rows.dtype).view(shape))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}


def read_map(state: Mapping[str, Any]) -> ChannelMap:
    """The map that a state is of. Raises `CheckpointError` for a damaged one."""
    try:
        values: dict[str, Any] = {key: part.cpu() if isinstance(part, Tensor) else part for key, part in state.items()}
        return ChannelMap(**values)
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"damaged channel map of a feature: {error}") from error


def channel_maps(model: nn.Module, example_inputs: Any, names: Sequence[str]) -> dict[str, list[ChannelMap]]:
    """The maps of an uncut network's modules: every channel is its own, so far.

    **Returns:** module name → one map for each time that the module runs.

    **Raises:** `ConfigError` naming a module that is not there, does not run, or whose channels no plan speaks of.

    ```python
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    >>> found, = channel_maps(net, torch.zeros(1, 1, 2, 2), ["1"])["1"]
    >>> found.tensor, found.axis, found.source.tolist()
    ('0.weight', 1, [0, 1, 2, 3])

    ```
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise ConfigError(f"features: the network has no module {name!r}{suggestion(name, modules)}")
    traced = trace(model, example_inputs)
    axes, maps = _axes(traced), {}
    for name in names:
        calls = traced.sizes.returned.get(name, ())
        if not calls:
            raise ConfigError(f"features: module {name!r} does not run on the example inputs")
        own = {f"{name}.{leaf}" for leaf, _ in modules[name].named_parameters(recurse=False)}
        maps[name] = [_map(name, shaped, traced.sizes.assembly, axes, own) for shaped in calls]
    return maps


def _map(name: str, shaped: SizedLayout, assembly: Assembly, axes: Sequence[_Labelled], own: set[str]) -> ChannelMap:
    if len(shaped.shape) < 2:
        raise ConfigError(f"features: module {name!r} returns no feature map (a tensor of two axes or more)")
    cut = [
        axis
        for axis, labels in enumerate(shaped.layout)
        if any((assembly.group_of[v] >= 0).any() for v in labels or ())
    ]
    if not cut:  # no channel group: nothing of it is ever cut
        return _identity(1, shaped.shape[1], "", 0, linear=False)
    labels = shaped.layout[cut[0]]
    if len(cut) > 1 or not labels or len(labels) > 1:
        raise ConfigError(f"features: the channels of module {name!r} lie along several axes; name a layer nearby")
    groups, units = assembly.group_of[labels[0]], assembly.unit_of[labels[0]]
    found = [
        part for part, held, held_units in axes if np.array_equal(held, groups) and np.array_equal(held_units, units)
    ]
    if not found:
        raise ConfigError(
            f"features: no parameter has the channels that module {name!r} returns, so plans don't tell what becomes of"
            " them; name the module before or after it"
        )
    part = min(found, key=lambda part: part.tensor not in own)  # the first of its own, else the first
    linear = part.tensor in own and part.role in _FILTERS
    return _identity(cut[0], len(units), part.tensor, part.axis, linear=linear)


def _axes(traced: Traced) -> list[_Labelled]:
    """Every axis of a tensor that belongs to channel groups: one of its slices, and its positions' groups and units."""
    found: dict[tuple[str, int], _Labelled] = {}
    for index, group in enumerate(traced):
        for part in (*group.producers, *group.consumers):
            none = np.full(len(part.units), DROPPED)
            _, groups, units = found.setdefault((part.tensor, part.axis), (part, none, none.copy()))
            mine = np.asarray(part.units) != DROPPED
            groups[mine], units[mine] = index, np.asarray(part.units)[mine]
    return list(found.values())


def _identity(axis: int, length: int, tensor: str, along: int, *, linear: bool) -> ChannelMap:
    here = torch.arange(length)
    return ChannelMap(axis, tensor, along, linear, length, here, here.clone(), torch.ones(length))


def _alone(cut: Cut, part: Slice, linear: bool) -> Cut:
    """The cut of one slice only, as if it made the channels.

    What a module's own filters become, its outputs become. Elsewhere the next kernels say what a channel stands for:
    they take unit u for gain[u] times the new one, so the new one should be Σ gain·unit / Σ gain², by least squares.
    """
    if linear:
        return replace(cut, producers=(part,), consumers=(), gain=None)
    if cut.gain is None:
        return replace(cut, producers=(replace(part, weight=None),), consumers=(), blend=None)
    gain, new = np.asarray(cut.gain), np.asarray(cut.assignment)
    kept = new != DROPPED
    square = np.bincount(new[kept], gain[kept] ** 2)
    count = np.bincount(new[kept])
    share = np.where(square[new] > 0, gain / np.where(square[new] > 0, square[new], 1), 1 / count[new])
    weight = tuple(np.where(kept, share, 0).tolist())
    return replace(cut, producers=(replace(part, weight=weight),), consumers=(), blend=None, gain=None)


def refuse_unfitting(name: str, student: Tensor, wanted: Tensor, length: int, axis: int) -> None:
    """Raise `PlanError` if a feature map has other sizes than the teacher's after the cuts."""
    if student.shape == wanted.shape:
        return
    if student.dim() == wanted.dim() and student.shape[axis] != length:
        raise PlanError(
            f"feature {name!r}: the student has {student.shape[axis]} channels, the teacher {length} after the cuts"
            " that it knows of: call follow(plan) once after each cut"
        )
    raise PlanError(
        f"feature {name!r}: shape {tuple(student.shape)} in the student, {tuple(wanted.shape)} in the teacher"
    )
