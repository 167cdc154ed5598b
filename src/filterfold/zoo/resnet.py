"""ResNets for CIFAR with parameter-free shortcuts: the networks that Li et al. 2017 prune."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError
from .registry import check, check_widths, initialise, register, scale

STAGES = (16, 32, 64)
"""Channels of the residual stream in the three stages (He et al. 2016, section 4.2)."""


DEPTHS = (20, 32, 44, 56, 110)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, then zero channels, half before and half after.

    **Arguments:**

    - `stride`: distance between the pixels that are taken.
    - `before`, `after`: numbers of zero channels.
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, features: Tensor) -> Tensor:
        """(batch, c, h, w) → (batch, before + c + after, h / stride, w / stride)."""
        taken = features[:, :, :: self.stride, :: self.stride]
        return functional.pad(taken, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around the residual stream.

    **Arguments:** `inputs`, `inner`, `outputs`: channels of the stream before, of the first
    convolution's filters, and of the stream after; `stride` of the first convolution.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            before = (outputs - inputs) // 2
            self.shortcut = PadShortcut(stride, before, outputs - inputs - before)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, inputs, h, w) → (batch, outputs, h / stride, w / stride)."""
        inner = functional.relu(self.bn1(self.conv1(features)))
        outer = self.bn2(self.conv2(inner))
        return functional.relu(outer + self.shortcut(features))


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, average over the pixels, linear layer.

    Names: `conv1`, `bn1`, `layerS.B.conv1`, `layerS.B.bn1`, `layerS.B.conv2`, `layerS.B.bn2`, `linear`
    (S = stage 1..3, B = block), as in the widely used weights of pytorch_resnet_cifar10.

    **Arguments:**

    - `stages`: channels of the residual stream, one for each stage.
    - `inner`: channels of every block's first convolution, one sequence for each stage.
    - `classes`, `channels`: outputs and input channels.
    """

    def __init__(self, stages: Sequence[int], inner: Sequence[Sequence[int]], *, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, stages[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        inputs = [stages[0], *stages[:-1]]
        self.layer1, self.layer2, self.layer3 = (
            _stage(before, widths, after, stride)
            for before, widths, after, stride in zip(inputs, inner, stages, (1, 2, 2), strict=True)
        )
        self.linear = nn.Linear(stages[-1], classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images of shape (batch, channels, height, width)."""
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return cast(Tensor, self.linear(functional.adaptive_avg_pool2d(features, 1).flatten(1)))


def build_resnet(
    depth: int,
    *,
    classes: int = 10,
    channels: int = 3,
    width: float = 1.0,
    inner: Sequence[int] | None = None,
) -> ResNet:
    """A CIFAR ResNet of 6n + 2 layers with option-A shortcuts (He et al. 2016, section 4.2).

    ResNet-56 has 848,944 convolution and linear weights and takes 125,485,696 multiply-accumulates
    for a 32×32 image. Any image size works: the features are averaged over all pixels.

    **Arguments:**

    - `depth`: 6n + 2, such as 20, 32, 44, 56 or 110.
    - `classes`, `channels`: outputs and input channels.
    - `width`: multiplier on every layer's width.
    - `inner`: explicit widths of the blocks' first convolutions, one for each of the 3n blocks: the
      network that is left after pruning them, from scratch. The stream keeps its width.

    **Returns:** the network with freshly drawn weights.

    **Raises:** `ModelError` for a depth or widths that make no network.

    ```python
    >>> model = build_resnet(20, inner=[8, 8, 8, 16, 16, 16, 32, 32, 32])
    >>> model.layer2[0].conv1.weight.shape, model.layer2[0].conv2.weight.shape
    (torch.Size([16, 16, 3, 3]), torch.Size([32, 16, 3, 3]))

    ```
    """
    name = f"resnet{depth}"
    check(name, classes=classes, channels=channels, width=width)
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ModelError(f"{name}: a CIFAR ResNet has 6n + 2 layers; give one of {', '.join(map(str, DEPTHS))}")
    stages = [scale(size, width) for size in STAGES]
    widths = [size for size in stages for _ in range(blocks)]
    if inner is not None:
        widths = list(check_widths(name, inner, 3 * blocks, "first convolutions"))
    split = [widths[start : start + blocks] for start in range(0, 3 * blocks, blocks)]
    return ResNet(stages, split, classes=classes, channels=channels)


def _stage(inputs: int, widths: Sequence[int], outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, widths[0], outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, inner, outputs, 1) for inner in widths[1:]))


def _registered(depth: int, *, classes: int, channels: int, width: float, image_size: int) -> nn.Module:
    if image_size < 1:
        raise ModelError(f"resnet{depth}: image_size={image_size} makes no image; give at least 1")
    return build_resnet(depth, classes=classes, channels=channels, width=width)


for _depth in DEPTHS:
    register(f"resnet{_depth}")(partial(_registered, _depth))
