"""Which sizes every operation of the pruned network should see, computed from the labels before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan import DROPPED, Plan
from .assemble import Assembly
from .dispatch import SizedLayout, Step
from .labels import FREE, Axis


class PredictedSizes:
    """Predicts sizes after a cut.

    **Arguments:**

    - `assembly`: the groups, and the group and unit of each label.
    - `plan`: the cut.
    """

    def __init__(self, assembly: Assembly, plan: Plan) -> None:
        self._assembly = assembly
        cuts = {cut.group: cut for cut in plan.cuts}
        size = max((group.size for group in assembly.groups), default=0)
        table = np.tile(np.arange(size), (len(assembly.groups) + 1, 1))
        for row, group in enumerate(assembly.groups):
            if group.name in cuts:
                table[row, : group.size] = cuts[group.name].assignment
        # per label, the unit that it ends up in; labels of no group stay
        self._ends_in = np.where(assembly.group_of < 0, 0, table[assembly.group_of, assembly.unit_of])
        self._folds = any(cut.folds for cut in plan.cuts)
        self._survivors: dict[tuple[int, ...], tuple[Axis, NDArray[np.bool_]]] = {}

    def survives(self, axis: Axis, size: int) -> NDArray[np.bool_]:
        """Which of an axis's positions are there after the cut; of folded ones, the first of each kind."""
        key = (size, *map(id, axis or ()))
        if key not in self._survivors:
            self._survivors[key] = axis, self._find_survivors(axis, size)
        return self._survivors[key][1]

    def _find_survivors(self, axis: Axis, size: int) -> NDArray[np.bool_]:
        kept = np.ones(size, dtype=bool)
        for vector in axis or ():
            group, end = self._assembly.group_of[vector], self._ends_in[vector]
            kept &= end != DROPPED
            if not self._folds:
                continue
            # Folded units leave one position each per slice: of the positions that end in one unit, those of the
            # first old unit stay. There is nothing to do where the axis holds no two units that are folded together.
            unit = self._assembly.unit_of[vector]
            first: dict[tuple[int, int], int] = {}
            if len(np.unique(np.stack([group, end], 1), axis=0)) < len(np.unique(np.stack([group, unit], 1), axis=0)):
                for place in np.flatnonzero(kept & (group >= 0)).tolist():
                    owner = first.setdefault((int(group[place]), int(end[place])), int(unit[place]))
                    kept[place] = owner == unit[place]
        return kept

    def known(self, axis: Axis) -> bool:
        """Whether an axis's size follows from the labels; that of a free or padded one only the code knows."""
        return axis is not FREE and not any(self._assembly.constant[vector].any() for vector in axis or ())

    def size(self, axis: Axis, size: int) -> int | None:
        """How many positions of an axis are left; None where only the code can know."""
        if not self.known(axis):
            return None
        return int(self.survives(axis, size).sum()) if axis else size

    def shape(self, tensor: SizedLayout) -> tuple[int | None, ...]:
        """The shape of a tensor after the cut, as far as it is known."""
        return tuple(self.size(axis, size) for axis, size in zip(tensor.layout, tensor.shape, strict=True))

    def groups_of(self, axis: Axis) -> list[str]:
        """Names of the groups that an axis's positions belong to."""
        found = {group for vector in axis or () for group in self._assembly.group_of[vector].tolist()} - {-1}
        return [self._assembly.groups[group].name for group in sorted(found)]

    def cut_groups(self, tensors: Sequence[SizedLayout]) -> dict[str, None]:
        """Names of the groups because of which these tensors have other sizes after the cut."""
        axes = [pair for tensor in tensors for pair in zip(tensor.layout, tensor.shape, strict=True)]
        cut = [axis for axis, old in axes if self.size(axis, old) not in (old, None)]
        return dict.fromkeys(name for axis in cut for name in self.groups_of(axis))

    def numbers(self, step: Step) -> dict[str, Any]:
        """The integer arguments of an operation after the cut.

        Those that no rule changes are left out; None stands for what is not known.
        """
        rule = _NUMBERS.get(step.op.removesuffix("_"))
        return rule(self, step) if rule is not None and step.outputs else {}

    def position(self, step: Step, dim: int, place: int) -> int:
        """Where a position of the source's axis `dim` comes to lie."""
        assert step.source is not None
        size = step.source.shape[dim]
        if place >= size:
            return place
        kept = self.survives(step.source.layout[dim], size)
        return int(kept[: place % size].sum()) if place >= 0 else -int(kept[place:].sum())


def _shapes(name: str) -> Callable[[PredictedSizes, Step], dict[str, Any]]:
    def predict(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
        """Sizes of the result, with what was left open (-1) left open."""
        wanted = sizes.shape(step.outputs[0])
        given = step.numbers.get(name, ())
        lead = len(wanted) - len(given)
        return {name: tuple(-1 if old == -1 else new for old, new in zip(given, wanted[lead:], strict=True))}

    return predict


def _unflatten(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
    given = step.numbers["sizes"]
    assert step.source is not None
    start = step.numbers["dim"] % len(step.source.shape)
    wanted = sizes.shape(step.outputs[0])[start : start + len(given)]
    return {"sizes": tuple(-1 if old == -1 else new for old, new in zip(given, wanted, strict=True))}


def _slice(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
    assert step.source is not None
    dim = step.numbers.get("dim", 0) % len(step.source.shape)
    if not step.source.layout[dim] or not sizes.known(step.source.layout[dim]):
        return {}
    ends = ("start", "end") if step.op == "slice" else ("start",)
    found = {n: sizes.position(step, dim, step.numbers[n]) for n in ends if n in step.numbers}
    if step.op == "narrow":
        found["length"] = sizes.shape(step.outputs[0])[dim]
    return found


def _split(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
    assert step.source is not None
    dim = step.numbers.get("dim", 0) % len(step.source.shape)
    pieces = tuple(sizes.shape(piece)[dim] for piece in step.outputs)
    name = next((name for name in ("split_size", "split_sizes") if name in step.numbers), None)
    if name is None:
        return {}
    return {name: pieces[0] if isinstance(step.numbers[name], int) else pieces}


def _groups(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
    assert step.source is not None
    channel = 1 if len(step.source.shape) == len(step.outputs[0].shape) and len(step.source.shape) > 2 else 0
    if step.numbers["groups"] == step.source.shape[channel] > 1:
        return {"groups": sizes.shape(step.source)[channel]}
    return {}


def _normalized(sizes: PredictedSizes, step: Step) -> dict[str, Any]:
    count = len(step.numbers["normalized_shape"])
    return {"normalized_shape": sizes.shape(step.outputs[0])[-count:]}


_NUMBERS: dict[str, Callable[[PredictedSizes, Step], dict[str, Any]]] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "broadcast_to"), _shapes("size")),
    "reshape": _shapes("shape"),
    "unflatten": _unflatten,
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _groups),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _groups),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), _normalized),
}


def settled(given: Any, wanted: Any) -> Any:
    """What is wanted, with what is given where nothing is known.

    >>> settled((1, 8, 3), (1, 4, None))
    (1, 4, 3)
    """
    if isinstance(given, tuple) and isinstance(wanted, tuple):
        return tuple(a if b is None else b for a, b in zip(given, wanted, strict=True))
    return given if wanted is None else wanted


def replaced(given: Any, wanted: Any) -> list[tuple[int, int]]:
    """The pairs (given, wanted) that differ between two integers or two sequences of integers.

    >>> replaced((1, 8, -1), (1, 4, -1))
    [(8, 4)]
    """
    if isinstance(given, Sequence) and isinstance(wanted, Sequence):
        return [(a, b) for a, b in zip(given, wanted, strict=False) if a != b and b is not None]
    return [(given, wanted)] if given != wanted and wanted is not None else []
