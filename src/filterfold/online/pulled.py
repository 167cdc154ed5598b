"""What the clustering term works on: parameters, and the clusters along their rows, laid out once for many batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..folding import signs
from ..groups import ChannelGroup
from .grouping import ROWS, along
from .pull import add_gradient, averager, pull, value_and_gradient


@dataclass(frozen=True, slots=True)
class Pulled:
    """One parameter whose filters are pulled together; `positions` along `axis` of it, all where None.

    `room` is memory to work in, which all of them share.
    """

    parameter: Tensor
    axis: int
    positions: Tensor | None
    labels: Tensor
    mean: Tensor
    sign: Tensor | None
    room: Tensor

    def value(self) -> Tensor:
        """The clustering term of this parameter."""
        return pull(self._rows(self.parameter), self.labels, self.mean, self.sign)

    def add_gradient(self, strength: float) -> None:
        """Add strength times the term's gradient to the parameter's."""
        parameter = self.parameter.detach()
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(parameter)
        grad = self.parameter.grad
        rows, place = self._as_stored(parameter), self._as_stored(grad)
        wide = rows.dtype == place.dtype and rows.dtype in (torch.float32, torch.float64)
        if self.positions is None and wide and place.is_contiguous():
            flat = place.flatten(1), rows.flatten(1)
            add_gradient(*flat, self.labels, self.mean, self.sign, strength, self.room)
            return
        rows = self._rows(parameter)
        gradient = value_and_gradient(rows, self.labels, self.mean, self.sign)[1].to(grad.dtype).view_as(rows)
        if self.positions is None:
            grad.movedim(self.axis, 0).add_(gradient, alpha=strength)
        else:
            grad.movedim(self.axis, 0).index_add_(0, self.positions, gradient, alpha=strength)

    def _as_stored(self, tensor: Tensor) -> Tensor:
        """The filters' axis first, the others as they lie in the parameter's memory: flat rows are then a view."""
        first = self.parameter.movedim(self.axis, 0)
        others = sorted(range(1, first.dim()), key=first.stride, reverse=True)
        return tensor.movedim(self.axis, 0).permute(0, *others)

    def _rows(self, parameter: Tensor) -> Tensor:
        rows = parameter.movedim(self.axis, 0) if self.axis else parameter
        return rows if self.positions is None else rows[self.positions]


def pulled(groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Pulled]:
    """Every trainable filter tensor of the groups that have labels."""
    pieces = [(group, piece) for group in groups if group.name in labels for piece in group.producers]
    pieces = [(group, piece) for group, piece in pieces if piece.role in ROWS and tensors[piece.tensor].requires_grad]
    rooms: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for parameter in sorted((tensors[piece.tensor] for _, piece in pieces), key=torch.numel, reverse=True):
        key = parameter.device, parameter.dtype
        if key not in rooms:
            rooms[key] = torch.empty(3, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
    found = []
    for group, piece in pieces:
        parameter, sign = tensors[piece.tensor], signs(group, tensors)
        device, dtype = parameter.device, parameter.dtype
        positions, own = along(piece, labels[group.name])
        units = torch.tensor(piece.units) if positions is None else torch.tensor(piece.units)[positions]
        own_sign = None if sign is None else sign[units][:, None].to(device)
        place = None if positions is None else positions.to(device)
        mean = averager(own).to(device, torch.promote_types(dtype, torch.float32))
        mean = mean.amax(dim=1, keepdim=True) if device.type == "cpu" else mean  # all that `means` asks for there
        room = rooms[device, dtype]
        found.append(Pulled(parameter, piece.axis, place, own.to(device), mean, own_sign, room))
    return found
