"""Coupled layers that follow a projection shortcut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Literal

from torch import Tensor

from ..groups import ChannelGroup
from ..plan import Slice

Follow = Literal["shortcut"]

WORDS = ("downsample", "shortcut", "skip", "proj")
"""What projection shortcuts are called in torchvision, timm, and the usual CIFAR code."""


def following(group: ChannelGroup, evidence: Mapping[str, Tensor]) -> ChannelGroup:
    """The group as its projection shortcut alone makes it, for scoring; the group itself if it has none.

    Li et al. (2017), section 3.4: "the filters of the second layer of the residual block are pruned by the indices
    selected by the shortcut". The projection is the one coupled layer with 1×1 kernels among layers with larger ones,
    or, where others have 1×1 kernels too (bottleneck blocks), the one that is called so.

    **Arguments:**

    - `group`: a channel group.
    - `evidence`: parameters by name, for the kernels' sizes; names that are missing are judged by name alone.

    ```python
    >>> import torch
    >>> parts = (Slice("conv2.weight", 0, (0, 1), "filter"), Slice("downsample.0.weight", 0, (0, 1), "filter"))
    >>> group = ChannelGroup("conv2", 2, parts, (), True, None, (0, 0), (0, 0))
    >>> kernels = {"conv2.weight": torch.zeros(2, 2, 3, 3), "downsample.0.weight": torch.zeros(2, 1, 1, 1)}
    >>> [part.tensor for part in following(group, kernels).producers]
    ['downsample.0.weight']

    ```
    """
    makers = [part for part in group.producers if part.role == "filter"]
    named = [part for part in makers if any(word in part.tensor for word in WORDS)]
    small = [part for part in makers if _is_pointwise(part, evidence)]
    found = named if len(named) == 1 else small if len(small) == 1 else []
    if len(makers) < 2 or not found or not set(range(group.size)) <= set(found[0].units):
        return group
    return replace(group, producers=tuple(found))


def _is_pointwise(part: Slice, evidence: Mapping[str, Tensor]) -> bool:
    tensor = evidence.get(part.tensor)
    return tensor is not None and tensor.dim() > 2 and prod(tensor.shape[2:]) == 1
