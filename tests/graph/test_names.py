"""Names of groups where a parameter's axes make channels of several: no name comes twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
from filterfold.graph import trace

from .networks import randomise


def test_experts_mixed_for_each_example() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Conv2d(6, 2, 1)
            self.w = nn.Parameter(torch.randn(4, 6, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            n, c, h, w = y.shape
            kernels = torch.einsum("bk,koihw->boihw", self.gate(y.mean((2, 3))).softmax(1), self.w)
            z = F.conv2d(y.reshape(1, -1, h, w), kernels.reshape(-1, c, 3, 3), padding=1, groups=n)
            return self.b(z.view(n, -1, h, w).relu())

    model, x = randomise(Mixed()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    names = [group.name for group in trace(model, x)]
    assert len(set(names)) == len(names) > 4
    result = ff.prune(model, x, keep=0.5)
    assert model.w.shape[1] == 3
    assert result.verified


def test_weight_used_both_ways() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.b(self.a(x).relu()).relu(), self.a.weight)

    model = randomise(Tied())
    ff.prune(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), keep=0.5)
    assert model.a.weight.shape == (4, 3, 1, 1)
