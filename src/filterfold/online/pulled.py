"""What the clustering term works on: parameters, and the clusters along their rows, laid out once for many batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..folding import signs
from ..groups import ChannelGroup
from .grouping import ROWS, along
from .pull import averager, pull, value_and_gradient


@dataclass(frozen=True, slots=True)
class Pulled:
    """One parameter whose filters are pulled together; `positions` along `axis` of it, all where None."""

    parameter: Tensor
    axis: int
    positions: Tensor | None
    labels: Tensor
    mean: Tensor
    sign: Tensor | None

    def value(self) -> Tensor:
        """The clustering term of this parameter."""
        return pull(self._rows(self.parameter), self.labels, self.mean, self.sign)

    def add_gradient(self, strength: float) -> None:
        """Add strength times the term's gradient to the parameter's."""
        rows = self._rows(self.parameter.detach())
        gradient = value_and_gradient(rows, self.labels, self.mean, self.sign)[1].to(rows.dtype).view_as(rows)
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        place = self.parameter.grad.movedim(self.axis, 0)
        if self.positions is None:
            place.add_(gradient, alpha=strength)
        else:
            place.index_add_(0, self.positions, gradient, alpha=strength)

    def _rows(self, parameter: Tensor) -> Tensor:
        rows = parameter.movedim(self.axis, 0) if self.axis else parameter
        return rows if self.positions is None else rows[self.positions]


def pulled(groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Pulled]:
    """Every trainable filter tensor of the groups that have labels."""
    found = []
    for group in groups:
        if group.name not in labels:
            continue
        sign = signs(group, tensors)
        for piece in (piece for piece in group.producers if piece.role in ROWS):
            parameter = tensors[piece.tensor]
            if not parameter.requires_grad:
                continue
            device = parameter.device
            positions, own = along(piece, labels[group.name])
            units = torch.tensor(piece.units) if positions is None else torch.tensor(piece.units)[positions]
            own_sign = None if sign is None else sign[units][:, None].to(device)
            place = None if positions is None else positions.to(device)
            found.append(Pulled(parameter, piece.axis, place, own.to(device), averager(own).to(device), own_sign))
    return found
