"""Criteria that read the weights alone."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan import ChannelGroup
from .registry import Evidence, criterion
from .unit_rows import Combine, over_filters

_AT_ONCE = 1 << 16
"""Elements at a time: what stays in the cache. New memory is what takes most of the time for a large layer."""


@criterion("l1")
def l1(group: ChannelGroup, tensors: Evidence, combine: Combine = "sum") -> Tensor:
    """Σ|w| over a unit's filter: the score of Li et al. (2017), section 3.1."""
    return over_filters(group, tensors, _l1, combine)


def _l1(rows: Tensor) -> Tensor:
    """Σ|w| of every row, a few rows at a time, so that |w| as a whole is never written to memory."""
    few = max(1, _AT_ONCE // max(1, rows.shape[1]))
    place = torch.empty_like(rows[:few], memory_format=torch.contiguous_format)
    parts = torch.split(rows, few)
    return torch.cat([torch.abs(part, out=place[: len(part)]).sum(1) for part in parts])


@criterion("l2")
def l2(group: ChannelGroup, tensors: Evidence, combine: Combine = "sum") -> Tensor:
    """√Σw² over a unit's filter."""
    return over_filters(group, tensors, lambda rows: torch.linalg.vector_norm(rows, dim=1), combine)


@criterion("largest")
def largest(group: ChannelGroup, tensors: Evidence, combine: Combine = "sum") -> Tensor:
    """-Σ|w|: removes the *largest* filters first, a control of Li et al. (2017), section 4.4."""
    return -l1(group, tensors, combine)


@criterion("random")
def random(group: ChannelGroup, tensors: Evidence, seed: int = 0) -> Tensor:  # noqa: ARG001 - every criterion gets them
    """Uniform scores from the seed and the group's name; the global generators are not touched."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


@criterion("fpgm")
def fpgm(group: ChannelGroup, tensors: Evidence, combine: Combine = "sum") -> Tensor:
    """Σ_j ‖F_i - F_j‖₂ over all filters of the layer: those nearest to the geometric median go.

    He et al., "Filter Pruning via Geometric Median" (CVPR 2019), equation 8; on the signed weights.
    """
    return over_filters(group, tensors, _distances, combine)


def _distances(rows: Tensor) -> Tensor:
    exact = rows.double() if rows.device.type != "mps" else rows
    squares = exact.square().sum(1)
    distances = (squares[:, None] + squares - 2 * exact @ exact.T).clamp_min(0)
    return distances.fill_diagonal_(0).sqrt().sum(1)


@criterion("bn-scale")
def bn_scale(group: ChannelGroup, tensors: Evidence, combine: Combine = "sum") -> Tensor:
    """|γ| of the batch normalisation that follows (Liu et al., "Network Slimming", ICCV 2017)."""
    parts = [part for part in group.producers if part.role == "norm" and part.tensor.rpartition(".")[2] == "weight"]
    if not parts:
        raise ConfigError(
            f"group {group.name!r} has no normalisation with a scale: ignore it, or use another criterion"
        )
    return over_filters(group, tensors, lambda rows: rows.abs().sum(1), combine, parts)
