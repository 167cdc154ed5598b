"""Tensors that a rehearsal has cut, so that the cut itself need not do it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Cut, Plan
from .index_maps import Edit, Kind, cut_tensor, edits_of


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor's data and version before it was cut, by what it was cut, and the outcome."""

    before: Tensor
    version: int
    edit: Edit
    after: Tensor

    def holds(self, tensor: Tensor, edit: Edit) -> bool:
        """Whether cutting the tensor now would give the same."""
        return self.version == tensor._version and _same_memory(self.before, tensor) and _same_edit(self.edit, edit)


class CutCache:
    """Given to `apply`, collects the new tensors, and gives them out when the same data is cut in the same way.

    For one model. A tensor that was written into in between, or that had other data in the rehearsal, is cut anew.
    """

    def __init__(self) -> None:
        """Empty."""
        self.begin()

    def begin(self) -> None:
        """Forget everything: another plan will be rehearsed."""
        self._cuts: tuple[Cut, ...] | None = None
        self._edits: dict[str, Edit] = {}
        self._entries: dict[str, _Entry] = {}

    def edits(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
        """`edits_of`, computed once for the first plan since the beginning."""
        if self._cuts is None:
            self._cuts, self._edits = plan.cuts, edits_of(plan, tensors)
        return self._edits if plan.cuts is self._cuts else edits_of(plan, tensors)

    def cut(self, name: str, tensor: Tensor, edit: Edit, kind: Kind) -> Tensor:
        """`cut_tensor`, once for the same data."""
        known = self._entries.get(name)
        if known is not None and known.holds(tensor, edit):
            return known.after
        after = cut_tensor(tensor, edit, kind)
        if known is None:
            self._entries[name] = _Entry(tensor.detach(), tensor._version, edit, after)
        return after


def _same_edit(first: Edit, second: Edit) -> bool:
    """Whether two edits only drop positions, and the same ones."""
    if first is second:
        return True
    return first.keys() == second.keys() and all(
        len(cut.source) == len(second[axis].source) == 0 and torch.equal(cut.keep, second[axis].keep)
        for axis, cut in first.items()
    )


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors show the same part of the same memory in the same way."""
    same_place = first.data_ptr() == second.data_ptr() and first.dtype == second.dtype
    return same_place and first.shape == second.shape and first.stride() == second.stride()
