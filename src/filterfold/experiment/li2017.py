"""The shares of filters that Li et al. 2017 keep: the original algorithm's own widths.

Pruning Filters for Efficient ConvNets (arXiv 1608.08710), §4.1 and §4.2. Layers are counted from 1; in the CIFAR
ResNets the first convolutions of the blocks have the even numbers.
"""

from __future__ import annotations

VGG16_CONVOLUTIONS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
"""Places of conv1…conv13 in `features` of the zoo's `vgg16`."""

_RESNETS = {
    "resnet56": ((0.6, 0.3, 0.1), frozenset({16, 18, 20, 34, 38, 54})),
    "resnet110": ((0.5, 0.4, 0.3), frozenset({36, 38, 74})),
}
"""Variant B: the share pruned in each stage, and the sensitive layers that stay whole."""


def keep_shares(model: str) -> dict[str, float] | None:
    """Group name → share of the filters that stays, for the paper's own CIFAR networks; None for any other.

    VGG-16-A, ResNet-56-B and ResNet-110-B: the variants that the paper's text puts forward.

    >>> sorted(keep_shares("vgg16"))
    ['features.0', 'features.24', 'features.27', 'features.30', 'features.34', 'features.37', 'features.40']
    >>> keep_shares("resnet56")["layer2.1.conv1"], keep_shares("resnet20")
    (0.7, None)
    """
    if model == "vgg16":
        return {f"features.{place}": 0.5 for place in (VGG16_CONVOLUTIONS[0], *VGG16_CONVOLUTIONS[7:])}
    if model not in _RESNETS:
        return None
    pruned, whole = _RESNETS[model]
    blocks = (int(model.removeprefix("resnet")) - 2) // 6
    shares = {}
    for stage in range(3):
        for block in range(blocks):
            if 2 * (stage * blocks + block + 1) not in whole:
                shares[f"layer{stage + 1}.{block}.conv1"] = round(1 - pruned[stage], 9)
    return shares
