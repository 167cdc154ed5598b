"""Attributes that forward doesn't read: changed where it is certain what they mean, else listed."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff

from .networks import call, randomise


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, both with batch norms; `fused` makes one of them by its own sizes."""

    def __init__(self, in_channels: int, out_channels: int, depthwise: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups = in_channels if depthwise else 1
        self.wide = nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=self.groups, bias=False)
        self.narrow = nn.Conv2d(in_channels, out_channels, 1, groups=self.groups, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)))

    def fused(self) -> nn.Module:
        one = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, groups=self.groups).to(self.wide.weight)
        weight, bias = torch.zeros_like(one.weight), torch.zeros_like(one.bias)
        for layer, norm in zip((self.wide, self.narrow), self.norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel = layer.weight if layer is self.wide else F.pad(layer.weight, (1, 1, 1, 1))
            weight += kernel * scale.view(-1, 1, 1, 1)
            bias += norm.bias - norm.running_mean * scale
        one.weight.data.copy_(weight)
        one.bias.data.copy_(bias)
        return nn.Sequential(one, nn.ReLU())


def blocks() -> nn.Sequential:
    return nn.Sequential(
        Branches(3, 8), Branches(8, 8, depthwise=True), Branches(8, 12), Branches(12, 12), nn.Conv2d(12, 2, 1)
    )


def test_blocks_that_are_fused_after_the_cut_give_the_same() -> None:
    model = randomise(blocks())
    result = ff.prune(model, image(), keep=0.5, strict=True)
    sizes = [(block.in_channels, block.out_channels, block.groups) for block in list(model)[:4]]
    assert sizes == [(3, 4, 1), (4, 4, 4), (4, 6, 1), (6, 6, 1)]
    assert "unsure" not in result.plan.notes
    expected = call(model, image())
    with torch.no_grad():
        fused = nn.Sequential(*[block.fused() for block in list(model)[:4]], model[4])
    torch.testing.assert_close(call(fused, image()), expected)


def test_the_plan_carries_them_to_a_copy() -> None:
    model = randomise(blocks())
    copied = copy.deepcopy(model)
    plan = ff.prune(model, image(), keep=0.5).plan
    receipt = ff.apply(plan, copied)
    assert copied[1].groups == 4
    receipt.rollback()
    assert [(block.in_channels, block.groups) for block in list(copied)[1:3]] == [(8, 8), (8, 1)]


class Ambiguous(nn.Module):
    """`num_features` may be that of either norm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = self.other = 8
        self.a, self.one = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.b, self.two = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.two(self.b(self.one(self.a(x)))))


def test_what_is_not_certain_is_listed() -> None:
    model = randomise(Ambiguous())
    result = ff.prune(model, image(), keep={"a": 0.5, "b": 0.75})
    assert (model.num_features, model.other) == (8, 8)
    assert result.plan.notes["unsure"] == ["num_features"]
    assert "may be out of date, since forward does not read them: num_features" in str(result)
    assert ff.prune(randomise(Ambiguous()), image(), keep=0.5).plan.attributes[0].new == 4


class Misleading(nn.Module):
    """`in_channels` is the number of times that something is done: to change it would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = 8
        self.a, self.inner = nn.Conv2d(3, 8, 1), nn.Identity()
        self.c = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        for _ in range(self.in_channels):
            x = x * 1.1
        return self.c(x)


def test_a_change_that_does_harm_is_not_made() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Misleading())
    net[1].a = nn.Conv2d(8, 8, 1)
    model = randomise(net)
    result = ff.prune(model, image(), keep=0.5, strict=True)
    assert result.plan.widths == {"0": (8, 4), "1.a": (8, 4)}
    assert model[1].in_channels == 8
