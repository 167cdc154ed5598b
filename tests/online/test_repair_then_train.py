"""A repaired cut, trained on, is not worse than the same cut without repair: at high, usual and low rates."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
from filterfold import data

pytestmark = pytest.mark.slow


class Same(nn.Conv2d):
    """Pads in its own forward, as timm's `Conv2dSame` does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Block(nn.Module):
    """Inverted bottleneck, as in EfficientNet."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        wide = 3 * width
        layers = (nn.Conv2d(width, wide, 1, bias=False), Same(wide, wide, 3, stride, groups=wide, bias=False))
        self.expand, self.depthwise = layers
        self.project = nn.Conv2d(wide, width, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (wide, wide, width))
        self.skip = nn.Identity() if stride == 1 else nn.AvgPool2d(stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norms[0](self.expand(x)))
        y = F.relu6(self.norms[1](self.depthwise(y)))
        return self.skip(x) + self.norms[2](self.project(y))


def bottlenecks() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(Same(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), Block(16, 1), Block(16, 2), *head)


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


def steps(model: nn.Module, digits: data.ImageData, count: int, lr: float) -> nn.Module:
    """Plain SGD with momentum, decaying linearly."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(count):
            yield from data.batches(digits.train, 64, shuffle=True, seed=epoch)

    model.train()
    for done, (images, labels) in zip(range(count), stream(), strict=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - done / count)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module, digits: data.ImageData) -> float:
    images, labels = next(iter(data.batches(digits.test, 1000)))
    return float(F.cross_entropy(model.eval()(images), labels))


@pytest.mark.parametrize("make", [plain, bottlenecks])
def test_repair_then_train_is_not_worse_than_training_alone(make, digits) -> None:
    torch.manual_seed(0)
    model = steps(make(), digits, 150, 0.1)
    images = [batch for batch, _ in data.batches(digits.train, 128)][:4]
    plan = ff.prune(copy.deepcopy(model), digits.example, keep=0.6, verify=False).plan
    cut, repaired = copy.deepcopy(model), copy.deepcopy(model)
    ff.apply(plan, cut)
    ff.apply(plan, repaired)
    ff.reestimate(cut, images)
    ff.repair(repaired, model, plan, images)
    assert loss(repaired, digits) < loss(cut, digits)
    for lr in (0.1, 0.05, 0.02, 0.004):
        with_repair, without = (loss(steps(copy.deepcopy(net), digits, 20, lr), digits) for net in (repaired, cut))
        assert with_repair <= without, lr
