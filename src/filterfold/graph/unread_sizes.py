"""Sizes in attributes that forward doesn't read: a block that is fused later, a head that is replaced.

`stale_sizes.py` finds what a pass stumbles over. Other attributes go out of date unnoticed: `in_channels` of a block
that builds its deployed form from it. Those are changed where it is certain what they mean: by their name they are the
number of a module's inputs or outputs, or an attribute that layers inside of it have too, they had that value, and all
that could be meant has the same size after the cut. The others are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..plan import AttributeChange, Plan
from ..profiling.predict import removed_positions
from .dispatch import SizedLayout
from .predicted_sizes import PredictedSizes
from .trace import Traced

_INPUTS = re.compile(
    r"(in|inp|input|cin|nin|c1|inplanes|inchannels)$|(in|inp|input)_?(c|ch|chs|chan|chans|channel|channels|dim|dims|"
    r"planes|features|filters|size)$|(dim|channels|planes|features)_in$"
)


_OUTPUTS = re.compile(
    r"(out|oup|output|cout|nout|c2|outplanes|outchannels)$|(out|oup|output)_?(c|ch|chs|chan|chans|channel|channels|dim|"
    r"dims|planes|features|filters|size)$|(dim|channels|planes|features)_out$"
)


_OF_LAYERS = ("in_channels", "out_channels", "in_features", "out_features", "groups", "num_features", "num_channels")


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Layers whose attributes surgery sets."""


def unread_sizes(model: nn.Module, plan: Plan, traced: Traced) -> tuple[tuple[AttributeChange, ...], tuple[str, ...]]:
    """Attributes that hold the size of something that a plan cuts.

    **Arguments:** the model before surgery, the plan, and the model's groups.

    **Returns:** the changes that are certain, and the names of those attributes of which it is not (`block.dim_out`).
    """
    held = [
        (name, attribute, value)
        for name, module in model.named_modules()
        if not isinstance(module, _LAYERS)
        for attribute, value in vars(module).items()
        if type(value) is int and value > 1 and _means_a_size(attribute)
    ]
    if not held:
        return (), ()
    predicted, after = PredictedSizes(traced.sizes.assembly, plan), _layer_sizes(model, plan)
    changes: list[AttributeChange] = []
    unsure: list[str] = []
    for name, attribute, value in held:
        found = set(_possible(name, attribute, value, traced, predicted, after))
        if len(found) == 1 and found != {value}:
            changes.append(AttributeChange(name, attribute, value, found.pop()))
        elif found - {value}:
            unsure.append(f"{name}.{attribute}" if name else attribute)
    return tuple(changes), tuple(unsure)


def _means_a_size(attribute: str) -> bool:
    return attribute in _OF_LAYERS or bool(_INPUTS.fullmatch(attribute) or _OUTPUTS.fullmatch(attribute))


def _possible(
    name: str,
    attribute: str,
    value: int,
    traced: Traced,
    predicted: PredictedSizes,
    after: Mapping[str, Mapping[str, tuple[int, int]]],
) -> Iterator[int]:
    """What the value may be after the cut: the sizes of what it can mean."""
    seen = False
    for pattern, calls in ((_INPUTS, traced.sizes.received), (_OUTPUTS, traced.sizes.returned)):
        if pattern.fullmatch(attribute):
            for size in _channels(calls.get(name, ()), value, predicted):
                seen = True
                yield size
    if seen or attribute not in _OF_LAYERS:
        return
    prefix = f"{name}." if name else ""
    for layer, sizes in after.items():
        if layer.startswith(prefix) and sizes.get(attribute, (0, 0))[0] == value:
            yield sizes[attribute][1]


def _channels(calls: Sequence[SizedLayout], value: int, predicted: PredictedSizes) -> Iterator[int]:
    """Sizes after the cut of the axes that hold channels and had this size, of all calls."""
    for tensor in calls:
        for axis, size in zip(tensor.layout, tensor.shape, strict=True):
            left = predicted.size(axis, size)
            if axis and size == value and left is not None:
                yield left


def _layer_sizes(model: nn.Module, plan: Plan) -> dict[str, dict[str, tuple[int, int]]]:
    """For every convolution, linear layer and norm the sizes in its attributes: before, after."""
    removed = removed_positions(plan)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        first, second = (removed.get((f"{prefix}weight", axis), 0) for axis in (0, 1))
        if isinstance(module, nn.modules.conv._ConvNd):
            found[name] = _convolution_sizes(module, first, second)
        elif isinstance(module, nn.Linear):
            features = module.in_features, module.out_features
            found[name] = {
                "in_features": (features[0], features[0] - second),
                "out_features": (features[1], features[1] - first),
            }
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            found[name] = {"num_features": (module.num_features, module.num_features - first)}
        elif isinstance(module, nn.GroupNorm):
            found[name] = {"num_channels": (module.num_channels, module.num_channels - first)}
    return found


def _convolution_sizes(module: nn.modules.conv._ConvNd, first: int, second: int) -> dict[str, tuple[int, int]]:
    inputs, outputs, groups = module.in_channels, module.out_channels, module.groups
    rows, columns = module.weight.shape[0] - first, module.weight.shape[1] - second
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        left = rows if groups == inputs > 1 else groups
        sizes = rows, columns * left, left
    else:
        left = rows // (outputs // groups) if groups == inputs > 1 else groups
        sizes = columns * left, rows, left
    names = ("in_channels", "out_channels", "groups")
    return dict(zip(names, zip((inputs, outputs, groups), sizes, strict=True), strict=True))
