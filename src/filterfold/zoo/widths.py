"""What the network builders share: scaling widths, checking sizes, and initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import ModelError


def scale(channels: int, width: float) -> int:
    """A layer's channels times the width multiplier, at least 1.

    >>> scale(64, 0.25), scale(3, 0.1)
    (16, 1)
    """
    return max(1, round(channels * width))


def check(name: str, *, classes: int, channels: int, width: float) -> None:
    """Refuse counts below one and a width multiplier that is not positive."""
    for what, value in (("classes", classes), ("channels", channels)):
        if value < 1:
            raise ModelError(f"{name}: {what}={value} makes no network; give at least 1")
    if not width > 0:
        raise ModelError(f"{name}: width={width} makes no network; give a multiplier above 0, such as 0.25")


def check_widths(name: str, widths: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Explicit widths as a tuple; `ModelError` unless there are `count`, all at least 1."""
    if len(widths) != count:
        raise ModelError(f"{name}: {len(widths)} widths given for {count} {what}; give one for each")
    for index, value in enumerate(widths):
        if int(value) != value or value < 1:
            raise ModelError(f"{name}: width {value!r} at place {index} of the {what} is no count of at least 1")
    return tuple(int(value) for value in widths)


def initialise(model: nn.Module) -> None:
    """Draw convolution and linear weights as He et al. 2015 (arXiv 1502.01852, equation 10) do.

    Weights are normal with variance 2 / fan-in, biases zero; batch normalisation starts as PyTorch
    has it, with scale 1 and shift 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
