"""VGG for small images: 3×3 convolutions with batch normalisation, max-pooling between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from ..errors import ModelError
from .registry import check, check_widths, initialise, register, scale

SHAPES: dict[str, tuple[tuple[tuple[int, ...], ...], int]] = {
    "vgg16": (((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)), 512),
    "vgg_small": (((32, 32), (64, 64)), 64),
}
"""Name → channels of the convolutions, one tuple between max-pools, and the width of the first linear layer.

`vgg16` is Simonyan & Zisserman 2015, configuration D; `vgg_small` is for the 8×8 digits."""


class VGG(nn.Module):
    """Convolutions in the Sequential `features`, then the Sequential `classifier`.

    Every block is convolution, batch norm, ReLU for each of its widths, and a 2×2 max-pool.
    The classifier is linear, batch norm, ReLU, linear, as Li et al. 2017 (section 4.1) have it; no
    dropout. Layers followed by batch norm carry no bias: its shift does the same job.

    **Arguments:**

    - `blocks`: output channels of the convolutions, one sequence between pools.
    - `hidden`: width of the first linear layer.
    - `classes`, `channels`: outputs and input channels.
    - `image_size`: height and width of the input in pixels; it fixes the size of the first linear layer.
    """

    def __init__(
        self, blocks: Sequence[Sequence[int]], hidden: int, *, classes: int, channels: int, image_size: int
    ) -> None:
        super().__init__()
        side = image_size >> len(blocks)
        if side < 1:
            raise ModelError(
                f"a VGG with {len(blocks)} max-pools needs images of at least {1 << len(blocks)} pixels, not "
                f"{image_size}; use a smaller network (vgg_small) or a larger image_size"
            )
        layers: list[nn.Module] = []
        inputs = channels
        for block in blocks:
            for outputs in block:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * side * side, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images of shape (batch, channels, size, size)."""
        return cast(Tensor, self.classifier(self.features(images).flatten(1)))


def build_vgg(
    name: str = "vgg16",
    *,
    classes: int = 10,
    channels: int = 3,
    width: float = 1.0,
    image_size: int = 32,
    widths: Sequence[int] | None = None,
) -> VGG:
    """VGG-16 as Li et al. 2017 have it for CIFAR, or `vgg_small`.

    At its full size and 32×32 pixels VGG-16 has 14,977,728 convolution and linear weights and takes
    313,463,808 multiply-accumulates an image.

    **Arguments:**

    - `name`: `vgg16` (13 convolutions, linear 512) or `vgg_small` (4 convolutions, linear 64).
    - `classes`, `channels`, `image_size`: outputs, input channels, input height and width in pixels.
    - `width`: multiplier on every layer's width.
    - `widths`: explicit widths of all convolutions and, last, of the first linear layer, instead of
      `width`: the way to a small network from scratch.

    **Returns:** the network with freshly drawn weights.

    **Raises:** `ModelError` for sizes that make no network.

    ```python
    >>> model = build_vgg("vgg_small", channels=1, image_size=8, widths=[8, 8, 16, 16, 32])
    >>> [tuple(p.shape) for name, p in model.named_parameters() if "features.0" in name or "classifier.0" in name]
    [(8, 1, 3, 3), (32, 64)]

    ```
    """
    check(name, classes=classes, channels=channels, width=width)
    if name not in SHAPES:
        raise ModelError(f"{name!r} is no VGG of the zoo; there are {', '.join(SHAPES)}")
    blocks, hidden = SHAPES[name]
    flat = [scale(size, width) for block in blocks for size in block] + [scale(hidden, width)]
    if widths is not None:
        if width != 1.0:
            raise ModelError(f"{name}: width={width} and explicit widths exclude each other; give one")
        flat = list(check_widths(name, widths, len(flat), "convolutions and the linear layer"))
    rest = iter(flat)
    scaled = [[next(rest) for _ in block] for block in blocks]
    return VGG(scaled, next(rest), classes=classes, channels=channels, image_size=image_size)


for _name in SHAPES:
    register(_name)(partial(build_vgg, _name))
