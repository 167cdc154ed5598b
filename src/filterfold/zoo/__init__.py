"""Networks of the literature in the form that the papers prune, and networks of one's own, by name.

`build` finds a network by name: `vgg16`, `vgg_small`, `resnet20|32|44|56|110`, `timm:NAME`,
`torchvision:NAME`, `package.module:factory`, or `file.py:factory`.
"""

from __future__ import annotations

from .hub import Expected, expected, is_of_a_hub, pretrained, quiet
from .registry import build, is_listed, names, register
from .resnet import ResNet, build_resnet
from .vgg import VGG, build_vgg

__all__ = [
    "VGG",
    "Expected",
    "ResNet",
    "build",
    "build_resnet",
    "build_vgg",
    "expected",
    "is_listed",
    "is_of_a_hub",
    "names",
    "pretrained",
    "quiet",
    "register",
]
