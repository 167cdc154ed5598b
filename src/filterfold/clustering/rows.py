"""Directions of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def directions(x: Tensor) -> Tensor:
    """The rows of `x`, shape `(n, d)`, scaled to length 1; zero rows stay zero.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1)  # first, so that tiny rows don't underflow when squared
    length = scaled.norm(dim=1, keepdim=True)
    return torch.div(scaled, length.where(length > 0, 1))
