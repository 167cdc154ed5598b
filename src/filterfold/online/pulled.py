"""What the clustering term works on: parameters, and the clusters along their rows, laid out once for many batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..folding import signs
from ..groups import ChannelGroup
from .grouping import ROWS, along
from .pull import averager, pull


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
        rows = self.parameter.movedim(self.axis, 0) if self.axis else self.parameter
        rows = rows if self.positions is None else rows[self.positions]
        return pull(rows, self.labels, self.mean, self.sign)


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


def add_gradients(pulls: Sequence[Pulled], strength: float) -> None:
    """Add the gradient of strength · Σ value to the parameters' gradients.

    Nothing is run backward through them, so that hooks on them (a loss scaler's, DDP's) stay quiet.
    """
    if not pulls or not strength:
        return
    parameters = list({id(entry.parameter): entry.parameter for entry in pulls}.values())
    total = torch.stack([entry.value().double() for entry in pulls]).sum()
    for parameter, gradient in zip(parameters, torch.autograd.grad(strength * total, parameters), strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
