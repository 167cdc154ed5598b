"""What folding is held against, at the same milestones and with the same widths: dropping, and merely replacing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..folding import parts
from ..groups import ChannelGroup
from ..plan import Cut, Plan, keep_units
from ..structure import named_tensors, unwrap
from .grouping import ROWS, along


def drop(groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], counts: Mapping[str, Sequence[int]]) -> Plan:
    """Keep the best units of every part of each group.

    **Arguments:**

    - `scores`: group name → `(size,)`, higher = keep; of equal ones the first stay.
    - `counts`: group name → units to keep in each of `parts(group)`.
    """
    cuts = []
    for group in groups:
        if group.name not in counts:
            continue
        kept: list[int] = []
        for part, count in zip(parts(group), counts[group.name], strict=True):
            units = torch.tensor(part.units)
            order = scores[group.name][units].argsort(descending=True, stable=True)
            kept += units[order[:count]].tolist()
        cuts.append(Cut(group.name, keep_units(group.size, kept), group.producers, group.consumers))
    return Plan(tuple(cuts))


def write_back(groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], model: nn.Module) -> None:
    """Replace every filter by its cluster's mean and remove nothing: what a naive reading of the document does.

    Only filters change, in place; the network stays as large and as slow as it was.
    """
    tensors = dict(named_tensors(unwrap(model)))
    for group in groups:
        if group.name not in labels:
            continue
        label = labels[group.name].cpu()
        for piece in (piece for piece in group.producers if piece.role in ROWS):
            rows = tensors[piece.tensor].detach().movedim(piece.axis, 0)
            positions, slot = along(piece, label)
            place = (torch.arange(len(slot)) if positions is None else positions).to(rows.device)
            slot = slot.to(rows.device)
            total = rows.new_zeros(int(slot.max()) + 1, *rows.shape[1:]).index_add_(0, slot, rows[place])
            mean = total / torch.bincount(slot).view(-1, *[1] * (rows.ndim - 1)).to(rows)
            rows.index_copy_(0, place, mean[slot])
