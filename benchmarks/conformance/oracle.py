"""An oracle of its own: which network must a pruned one equal? Shares no code with the library's verification.

The error of an output is max|a - b| / max|a| in float64, that of a network the largest over its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-7
"""In float64 a right network comes within 1e-12; one wrong channel costs 1e-3 and more."""


def randomise(model: nn.Module) -> None:
    """Generic values for whatever a fresh network has constant: else zeros and ones hide wrong channels."""
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        values = parameter.data
        if values.is_floating_point() and (
            values.ndim <= 1 or values.numel() == 1 or bool((values == values[0]).all())
        ):
            values.add_(torch.randn_like(values) * 0.1)


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Every tensor that the model returns, in eval mode."""
    model.eval()
    with torch.inference_mode():
        return list(_tensors(model(inputs)))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def error(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest relative error over all outputs; infinite where the shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        found = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        worst = max(worst, found if found == found else float("inf"))
    return worst


def masked(model: nn.Module, plan: Any) -> nn.Module:
    """A float64 copy whose consumers have zeros wherever they read a dropped unit."""
    copied = copy.deepcopy(model).double()
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    with torch.no_grad():
        for cut in plan.cuts:
            for part in cut.consumers:
                gone = [i for i, unit in enumerate(part.units) if unit >= 0 and cut.assignment[unit] < 0]
                if gone:
                    tensors[part.tensor].index_fill_(part.axis, torch.tensor(gone), 0)
    return copied


def dead(model: nn.Module, plan: Any, groups: Collection[str]) -> nn.Module:
    """The model, changed in place: whatever makes the dropped units of these groups is zero."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for cut in plan.cuts:
        for part in cut.producers if cut.group in groups else ():
            gone = [i for i, unit in enumerate(part.units) if unit >= 0 and cut.assignment[unit] < 0]
            tensors[part.tensor].data.index_fill_(part.axis, torch.tensor(gone, dtype=torch.long), 0)
    return model


def emptied(model: nn.Module, pruned: nn.Module) -> nn.Module | None:
    """A float64 copy of the original with zeros wherever any pruning tool removed something.

    What was removed is found by looking up each value that is left in the original tensor, so the tool need
    not say. Where no function with f(0) ≠ 0 stands between a removed channel and a grouped convolution, and no
    normalisation runs over channels, a right cut equals this. None where a tensor can't be matched.
    """
    copied = copy.deepcopy(model)
    after = dict(pruned.named_parameters())
    shared = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "groups", 1) != 1}
    for name, tensor in copied.named_parameters():
        if name not in after or after[name].dim() != tensor.dim():
            return None
        if after[name].shape != tensor.shape:
            kept = _kept(tensor.data, after[name].data)
            if kept is None:
                return None
            for axis, indices in kept.items():
                if axis == 1 and name in shared:  # a position there is one input of every group; its makers are empty
                    continue
                gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
                gone[indices] = False
                tensor.data.index_fill_(axis, gone.nonzero().flatten(), 0)
    return copied.double()


def _kept(before: Tensor, after: Tensor) -> dict[int, Tensor] | None:
    """Axis → the positions along it that are left, for the axes whose size changed.

    Found from the lines through the first element that is left, all of whose values must occur in their order.
    """
    corner = (0,) * after.dim()
    for place in (before == after[corner]).nonzero().tolist():
        kept = {}
        for axis in range(before.dim()):
            along = before[tuple(slice(None) if a == axis else p for a, p in enumerate(place))]
            left = after[tuple(slice(None) if a == axis else 0 for a in range(after.dim()))]
            found = _places(along.tolist(), left.tolist())
            if found is None:
                break
            kept[axis] = torch.tensor(found)
        else:
            return {axis: kept[axis] for axis in kept if before.shape[axis] != after.shape[axis]}
    return None


def _places(values: list[float], kept: list[float]) -> list[int] | None:
    """Where the values that are left stood, given that they kept their order; a value may occur twice."""
    places, start = [], 0
    for value in kept:
        try:
            start = values.index(value, start) + 1
        except ValueError:
            return None
        places.append(start - 1)
    return places
