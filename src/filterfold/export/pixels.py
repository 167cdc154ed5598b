"""Normalisation as a part of a network, so that whoever runs it gives it pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class FromPixels(nn.Module):
    """A network that takes pixels as they are in files, bytes from 0 to 255, and normalises them itself.

    **Arguments:**

    - `network`: takes images of which `mean` was subtracted, and which then were divided by `std`.
    - `mean`, `std`: of each channel, of values scaled to 0 … 1.

    **Raises:** `ConfigError` if there are not as many means as deviations, or a deviation is not above 0.

    >>> FromPixels(nn.Identity(), [0.5], [0.25])(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    tensor([[[[-2.,  2.]]]])
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"mean {list(mean)}, std {list(std)}: give one of each a channel, deviations above 0")
        self.network = network
        means, deviations = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("factor", (1 / (255 * deviations)).float())
        self.register_buffer("shift", (-means / deviations).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """What the network gives for pixels: uint8, shape (n, channels, height, width)."""
        found: Tensor = self.network(pixels.float() * self.factor + self.shift)
        return found


class ToPixels(nn.Module):
    """A network that takes pixels, for those who have normalised images: the inverse of `FromPixels`, rounded.

    >>> ToPixels(nn.Identity(), [0.5], [0.25])(torch.tensor([[[[-2.0, 2.0]]]])).flatten()
    tensor([  0, 255], dtype=torch.uint8)
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self._normalization = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """What the network gives for normalised images."""
        found: Tensor = self.network(pixels_of(images, *self._normalization))
        return found


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The bytes that normalised images were made of."""
    means, deviations = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return ((images * deviations + means) * 255).round().clamp(0, 255).to(torch.uint8)
