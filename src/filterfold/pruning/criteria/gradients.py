"""Criteria that read gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import ConfigError, DataError
from ...plan import ChannelGroup, Slice
from ...utils.inputs import call
from ...utils.model_state import preserved
from .registry import Batch, Evidence, criterion
from .unit_rows import filters


@contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def products(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Batch], loss: Callable[..., Tensor]
) -> Evidence:
    """Group name → mean over batches of (Σ weight·gradient over a unit's filter slices)², shape `(size,)`.

    The model is in eval mode; gradients are taken aside, so `.grad` keeps what it had.
    """
    owned = dict(model.named_parameters())
    parts = {group.name: [part for part in filters(group) if part.tensor in owned] for group in groups}
    names = sorted({part.tensor for chosen in parts.values() for part in chosen})
    parameters = [owned[name] for name in names]
    total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    count = 0
    with preserved(model), _differentiable(parameters):
        for inputs, targets in batches:
            if targets is None:
                raise DataError("the taylor criterion needs targets: let the loader give (inputs, targets)")
            with torch.inference_mode(False), torch.enable_grad():
                inputs, targets = tree_map(_usable, (inputs, targets))
                value = loss(call(model, inputs), targets)
                found = torch.autograd.grad(value, parameters, allow_unused=True)
            gradients = dict(zip(names, found, strict=True))
            for group in groups:
                total[group.name] += _unit_sums(group, parts[group.name], owned, gradients).square()
            count += 1
    return {name: sums / max(1, count) for name, sums in total.items()}


def _usable(leaf: Any) -> Any:
    """A tensor made in inference mode can't take part in a graph; its copy can."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _unit_sums(
    group: ChannelGroup,
    parts: Iterable[Slice],
    owned: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor | None],
) -> Tensor:
    sums = torch.zeros(group.size + 1, dtype=torch.float64)  # the last one takes what is not of this group
    for part in parts:
        gradient = gradients[part.tensor]
        if gradient is not None:
            product = (owned[part.tensor].detach() * gradient).movedim(part.axis, 0)
            labels = torch.tensor(part.units) % (group.size + 1)
            sums.index_add_(0, labels, product.reshape(len(labels), -1).double().sum(1).cpu())
    return sums[:-1]


@criterion("taylor", gather=products)
def taylor(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """Mean over batches of (Σ w·∂L/∂w)² over all filters of a unit.

    First-order estimate of the squared change of the loss when the unit is removed: Molchanov et
    al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), equation 8, with the
    weights of a unit as the set; coupled layers are within the sum, so nothing is left to combine.
    """
    if group.name not in evidence:
        raise ConfigError(f"group {group.name!r}: no gradient was gathered")
    return evidence[group.name]
