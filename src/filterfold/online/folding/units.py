"""What units are made of: who may be folded with whom, the rows that they are compared by, their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import PlanError
from ...plan import ChannelGroup, Slice
from ...pruning.criteria import unit_rows
from ..clustering import directions

Features = Literal["filters", "units"]


FILTER_ROLES = ("filter", "depthwise")
"""Roles of the slices that are filters of a unit."""


@dataclass(frozen=True, slots=True)
class ProducerLayer:
    """A layer among a group's producers: `kind` and its slices by the tensor's own name (`weight`, `running_var`)."""

    name: str
    kind: Literal["filter", "depthwise", "norm", "other"]
    slices: Mapping[str, Slice]


def features(group: ChannelGroup, tensors: Mapping[str, Tensor], kind: Features = "filters") -> Tensor:
    """What units are compared by: shape `(size, d)`.

    All filters that make the units together, each layer's scaled to length 1, so that every layer of a coupled group
    counts alike. `kind="units"` takes batch norm in where the group is one filter with one batch norm: (γ·u, β) at
    length 1, whose inner products are the correlations of the units' outputs if the inputs are white.
    """
    layers = producer_layers(group.producers)
    rows = [directions(rows_of(piece, group.size, tensors)) for layer in layers for piece in filter_slices(layer)]
    if not rows:
        raise PlanError(f"group {group.name!r} has no filters to cluster by: leave it out with ignore=[{group.name!r}]")
    norm = only_norm(layers)
    if norm is None or "weight" not in norm.slices:
        return torch.cat(rows, dim=1)
    gamma = rows_of(norm.slices["weight"], group.size, tensors)
    if kind == "filters" or "bias" not in norm.slices or gamma.shape[1] != 1:
        return rows[0] * sign_of(gamma[:, :1])
    beta = rows_of(norm.slices["bias"], group.size, tensors)
    return directions(torch.cat((rows[0] * gamma, beta), dim=1))


def importance(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """How much of what the next layers read comes from each unit: shape `(size,)`.

    The scale of its output (‖(γ, β)‖ where it ends in a norm, else the length of its filters) times the length of
    the kernels that read it. An error made in a unit's direction counts about that much.
    """
    layers = producer_layers(group.producers)
    norms = [layer for layer in layers if layer.kind == "norm"]
    if any(layer.kind == "depthwise" for layer in layers):
        norms = norms[-1:]
    made = [norm.slices[leaf] for norm in norms for leaf in ("weight", "bias") if leaf in norm.slices]
    made = made or [piece for layer in layers for piece in filter_slices(layer)]
    lengths = []
    for pieces in (made, group.consumers):
        rows = [rows_of(piece, group.size, tensors).float() for piece in pieces]
        lengths.append(torch.cat(rows, dim=1).norm(dim=1) if rows else torch.ones(group.size))
    return lengths[0] * lengths[1].to(lengths[0].device)


def signs(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The units' signs, shape `(size,)`, where some are -1 (negative γ behind the only filter); else None."""
    norm = only_norm(producer_layers(group.producers))
    if norm is None or "weight" not in norm.slices:
        return None
    result = sign_of(rows_of(norm.slices["weight"], group.size, tensors)[:, 0]).float().cpu()
    return result if bool((result < 0).any()) else None


def rows_of(piece: Slice, size: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """The entries of all units in a slice's tensor, shape `(size, d)`; where units have fewer, zeros follow."""
    units, rows = unit_rows(piece, tensors[piece.tensor])
    return rows if len(units) == size else rows.new_zeros(size, rows.shape[1]).index_copy_(0, units, rows)


def producer_layers(producers: Iterable[Slice]) -> tuple[ProducerLayer, ...]:
    """The layers that a group's producing slices belong to, in the order in which the group lists them."""
    found: dict[str, dict[str, Slice]] = {}
    for piece in producers:
        layer, _, leaf = piece.tensor.rpartition(".")
        found.setdefault(layer, {})[leaf] = piece
    return tuple(ProducerLayer(name, _kind(slices), slices) for name, slices in found.items())


def filter_slices(layer: ProducerLayer) -> tuple[Slice, ...]:
    """The slices of a layer that are filters (depthwise ones too)."""
    return tuple(piece for piece in layer.slices.values() if piece.role in FILTER_ROLES)


def only_norm(layers: Sequence[ProducerLayer]) -> ProducerLayer | None:
    """The batch norm of a group that is one filter with one norm, where they certainly belong together."""
    norms = [layer for layer in layers if layer.kind == "norm"]
    filters = [layer for layer in layers if layer.kind in FILTER_ROLES]
    if len(norms) == 1 and len(filters) == 1 and len(filter_slices(filters[0])) == 1:
        return norms[0]
    return None


def _kind(slices: Mapping[str, Slice]) -> Literal["filter", "depthwise", "norm", "other"]:
    roles = {piece.role for piece in slices.values()}
    if "filter" in roles:
        return "filter"
    if "depthwise" in roles:
        return "depthwise"
    return "norm" if "norm" in roles else "other"


def sign_of(values: Tensor) -> Tensor:
    """Sign with sign(0) = 1."""
    return torch.where(values < 0, -torch.ones_like(values), torch.ones_like(values))
