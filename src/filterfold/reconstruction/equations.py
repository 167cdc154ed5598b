"""One layer as a linear map: its unfolded inputs, and the normal equations of what is wanted of it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ELEMENTS = 2**23
"""Unfolded inputs are taken in pieces of at most so many float64 elements (64 MiB)."""


class Sums:
    """Normal equations of one layer, added up in float64: X inputs, R = wanted - output, for every group."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []

    def add(self, module: nn.Module, groups: int, data: Tensor, output: Tensor, wanted: Tensor) -> None:
        """Add one batch."""
        for x, y, t in rows(module, groups, exact(data), output, wanted):
            r = t - y
            new = [x.mT @ x, x.mT @ r, *(v.sum(1) for v in (x, r, r.square(), t, t.square()))]
            self.totals = [old + value for old, value in zip(self.totals, new, strict=True)] if self.totals else new
            self.count += x.shape[1]

    def solve(self, ridge: float, *, centred: bool, bias: Tensor | None) -> tuple[Tensor, Tensor, float, float]:
        """Change of the kernels `(groups, inputs, outputs)` and biases, and the relative error before and after."""
        gram, cross, x, r, r2, t, t2 = self.totals
        left, n = float(r2.sum()), self.count
        offset = torch.zeros_like(r)
        size = float((t2 - t.square() / n).sum()) if centred and bias is None else float(t2.sum())
        free = float((r2 - r.square() / n).sum()) if centred else left
        if centred:
            gram = gram - x[:, :, None] * x[:, None, :] / n
            cross = cross - x[:, :, None] * r[:, None, :] / n
        shift = torch.cholesky_solve(cross, torch.linalg.cholesky(ridged(gram, ridge)))
        gained = float(2 * (shift * cross).sum() - (shift * (gram @ shift)).sum())
        if bias is not None:
            offset = (r - (x[:, :, None] * shift).sum(1)) / n
        before = free if bias is None else left
        return shift, offset, _root(before, size), _root(free - gained, size)

    def moments(self, kernels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of the outputs that the kernels give."""
        gram, x, n = self.totals[0], self.totals[2], self.count
        mean = (x[:, :, None] * kernels).sum(1) / n
        square = (kernels * (gram @ kernels)).sum(1)
        var = (square - n * mean.square()).clamp_min(0) / max(n - 1, 1)
        return mean.flatten() + (0 if bias is None else bias), var.flatten()


def rows(module: Any, groups: int, data: Tensor, *outputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Unfolded inputs, and tensors of the outputs' shape, piece by piece, as `(groups, positions, features)`."""
    if isinstance(module, nn.Linear):
        flat = [value.reshape(1, -1, value.shape[-1]) for value in (data, *outputs)]
        step = max(1, _ELEMENTS // flat[0].shape[-1])
        for start in range(0, flat[0].shape[1], step):
            yield tuple(value[:, start : start + step] for value in flat)
        return
    if data.dim() == spatial(module) + 1:  # no batch axis
        data, outputs = data[None], tuple(value[None] for value in outputs)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    data = functional.pad(data, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [tuple(size) for size in (module.kernel_size, module.dilation, module.stride)]
    if spatial(module) == 1:
        data, sizes = data[:, :, None], [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    space = zip(data.shape[2:], kernel, dilation, stride, strict=True)
    positions = prod((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in space)
    step = max(1, _ELEMENTS // max(1, positions * module.weight[0].numel() * groups))
    for start in range(0, len(data), step):
        columns = functional.unfold(data[start : start + step], kernel, dilation, stride=stride)
        yield tuple(
            value.reshape(len(value), groups, -1, positions).permute(1, 0, 3, 2).flatten(1, 2)
            for value in (columns, *(value[start : start + step] for value in outputs))
        )


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """XᵀX of every group with `ridge` times its mean diagonal added to the diagonal."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # inputs that are never on: nothing to solve
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + (ridge * scale)[:, None, None] * eye


def spatial(module: nn.Module) -> int:
    """Number of a convolution's spatial axes."""
    return 1 if isinstance(module, nn.Conv1d) else 2


def exact(tensor: Tensor) -> Tensor:
    """The values in float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # which has no float64
    return tensor.detach().to(device, torch.float64)


def _root(error: float, size: float) -> float:
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0
