"""Criteria that read activations: what a filter puts out over a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...plan import ChannelGroup, Slice
from ...profiling.weight_ops import LAYERS, WeightOps, WeightUse
from ...utils.inputs import call
from ...utils.model_state import preserved
from .registry import Batch, Evidence, criterion
from .unit_rows import Combine, combined

Statistic = Callable[[Tensor], Tensor]
"""Maps of shape (images, channels, positions) → one number per image and channel."""


def _maps(values: Tensor, op: Any, weight: Tensor) -> Tensor:
    """An op's input or output as (images, channels, positions)."""
    if op is torch.ops.aten.linear:
        values = values.movedim(-1, 1 if values.dim() > 1 else 0)
        values = values if values.dim() > 1 else values[None]
    elif values.dim() < weight.dim():
        values = values[None]
    values = values[..., None] if values.dim() == 2 else values.flatten(2)
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Moments:
    """Mean and variance over images of a statistic per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Merge values of shape (images, channels): Chan et al. (1979), equations 2.1."""
        values = values.double().cpu()
        mean, count = values.mean(0), len(values)
        delta = mean - self.mean
        total = self.count + count
        self.squares = self.squares + (values - mean).square().sum(0) + delta.square() * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = total


def observe(
    model: nn.Module, batches: Iterable[Batch], wanted: set[str], statistic: Statistic, *, inputs: bool = False
) -> dict[str, _Moments]:
    """Run the model over the batches, and take a statistic of what the ops with certain weights put out (or read).

    Ops are watched at the dispatcher, so there are no hooks to leave behind, and functional and
    shared layers are seen like any other.
    """
    moments: dict[str, _Moments] = {}

    def seen(use: WeightUse) -> None:
        if use.name in wanted and use.op in LAYERS and use.op is not torch.ops.aten.bilinear:
            values = statistic(_maps(use.data if inputs else use.output, use.op, use.weight))
            moments.setdefault(use.name, _Moments()).add(values)

    with preserved(model):
        for batch, _ in batches:
            with torch.inference_mode(), WeightOps(model, seen):
                call(model, batch)
    return moments


def _outputs(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Batch],
    _loss: Any,
    *,
    statistic: Statistic,
    variance: bool,
) -> Evidence:
    wanted = {part.tensor for group in groups for part in group.producers if part.role == "filter"}
    moments = observe(model, batches, wanted, statistic)
    return {name: torch.as_tensor(m.squares / m.count if variance else m.mean) for name, m in moments.items()}


def _inputs(model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Batch], _loss: Any) -> Evidence:
    wanted = {part.tensor for group in groups for part in group.consumers if part.role == "kernel"}
    moments = observe(model, batches, wanted, lambda maps: (maps != 0).double().mean(2), inputs=True)
    return {name: torch.as_tensor(m.mean) for name, m in moments.items()}


def _per_unit(
    group: ChannelGroup, parts: Iterable[Slice], evidence: Evidence, combine: Combine, *, mean: bool
) -> Tensor:
    """Spread one value per channel over the units, several positions of a unit added or averaged."""
    scored = []
    for part in parts:
        if part.tensor not in evidence:
            continue
        channels = evidence[part.tensor]
        # a grouped kernel has one position for the same place in every group
        values = channels.view(-1, len(part.units)).mean(0)
        labels = torch.tensor(part.units) % (group.size + 1)
        sums = torch.zeros(group.size + 1, dtype=torch.float64).index_add_(0, labels, values)
        times = torch.bincount(labels, minlength=group.size + 1)
        units = (times[:-1] > 0).nonzero().squeeze(1)
        scored.append((units, sums[units] / times[units] if mean else sums[units]))
    if not scored:
        raise ConfigError(f"group {group.name!r}: no layer of it was seen at work; ignore it, or score by weights")
    return combined(group, scored, combine)


def _by_output(group: ChannelGroup, evidence: Evidence, combine: Combine = "sum") -> Tensor:
    parts = (part for part in group.producers if part.role == "filter")
    return _per_unit(group, parts, evidence, combine, mean=False)


STATISTICS: dict[str, tuple[Statistic, bool]] = {
    "mean-mean": (lambda maps: maps.mean(2), False),
    "mean-std": (lambda maps: maps.std(2, correction=0), False),
    "mean-l1": (lambda maps: maps.abs().sum(2), False),
    "mean-l2": (lambda maps: torch.linalg.vector_norm(maps, dim=2), False),
    "var-l2": (lambda maps: torch.linalg.vector_norm(maps, dim=2), True),
}
"""Li et al. (2017), section 4.5: mean over images of mean(x), std(x), ‖x‖₁, ‖x‖₂, and variance of
‖x‖₂, of a filter's feature map x before batch norm and ReLU. Standard deviation and variance are
those of the population, which ranks the same and is defined for one position or image."""


for _name, (_statistic, _variance) in STATISTICS.items():
    criterion(_name, gather=partial(_outputs, statistic=_statistic, variance=_variance))(_by_output)


@criterion("apoz", gather=_inputs)
def apoz(group: ChannelGroup, evidence: Evidence, combine: Combine = "sum") -> Tensor:
    """1 - the average percentage of zeros of a unit's channel (Hu et al. 2016, equation 1).

    Taken where the channel is read, that is after batch norm, ReLU and pooling, from the inputs of
    the layers that consume the group.
    """
    parts = (part for part in group.consumers if part.role == "kernel")
    return _per_unit(group, parts, evidence, combine, mean=True)
