"""The shares of filters that Li et al. 2017 keep: the original algorithm's own widths."""

from __future__ import annotations

from ..recipes import load

_FAVOURED = {"vgg16": "vgg16-a", "resnet56": "resnet56-b", "resnet110": "resnet110-b"}
"""VGG-16-A, ResNet-56-B and ResNet-110-B: the variants that the paper's text puts forward."""


def keep_shares(model: str) -> dict[str, float] | None:
    """Layer pattern → share of the filters that stays, for the paper's own CIFAR networks; None for any other.

    >>> keep_shares("resnet56")["layer2.*.conv1"], keep_shares("resnet20")
    (0.7, None)
    """
    return load(_FAVOURED[model]).keep if model in _FAVOURED else None
