"""Small networks for the constructs that real ConvNets use, and a check that a random cut of one is right."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import filterfold.surgery.apply as surgery
from filterfold.graph import ChannelGroup, Traced, UnrepairableError, rewrite_stale_sizes, trace
from filterfold.plan import Cut, Plan, Slice, keep_units


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Generic values everywhere, so that no mistake hides behind a zero, a one, or equal entries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if name.endswith("running_var") else (noise - 0.5) * 0.8)
    return model.double().eval()


def half(groups: Traced, seed: int = 0, share: float = 0.5) -> Plan:
    """A random cut of every free group that respects classes and blocks."""
    rng = random.Random(seed)
    cuts = []
    for group in groups:
        if group.frozen is not None:
            continue
        chosen = _choose(rng, group, share)
        cuts.append(Cut(group.name, keep_units(group.size, chosen), group.producers, group.consumers))
    return Plan(tuple(cuts))


def _choose(rng: random.Random, group: ChannelGroup, share: float) -> list[int]:
    """Units to keep: equally many of every block, at least one of every class."""
    if len(set(group.blocks)) > 1:
        blocks = [[u for u in range(group.size) if group.blocks[u] == block] for block in sorted(set(group.blocks))]
        chosen = [unit for units in blocks for unit in rng.sample(units, max(1, int(len(units) * share)))]
        emptied = set(group.classes) - {group.classes[unit] for unit in chosen}
        return list(range(group.size)) if emptied else chosen
    kinds = [[u for u in range(group.size) if group.classes[u] == kind] for kind in sorted(set(group.classes))]
    return [unit for units in kinds for unit in rng.sample(units, max(1, int(len(units) * share)))]


def flatten(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for item in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from flatten(item)


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return list(flatten(model(**inputs)))
        return list(flatten(model(*inputs) if isinstance(inputs, tuple) else model(inputs)))


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy in which everything that reads a dropped unit reads zeros."""
    copied = without_norms(copy.deepcopy(model))
    tensors = tensors_of(copied, model)
    with torch.no_grad():
        for cut in plan.cuts:
            for part in cut.consumers:
                tensors[part.tensor].index_fill_(part.axis, torch.tensor(dropped(cut, part), dtype=torch.long), 0)
    return copied


def dropped(cut: Cut, part: Slice) -> list[int]:
    """The positions of a slice that leave."""
    return [place for place, unit in enumerate(part.units) if unit >= 0 and cut.assignment[unit] < 0]


def without_norms(model: nn.Module) -> nn.Module:
    """Weight norms and spectral norms taken off, as someone who cuts by hand does first."""
    for module in model.modules():
        if "weight" in getattr(module, "parametrizations", {}):
            parametrize.remove_parametrizations(module, "weight")
        for hook in list(module._forward_pre_hooks.values()):
            if hasattr(hook, "remove") and hasattr(hook, "name"):
                hook.remove(module)
                module._forward_pre_hooks.clear()
    return model


def dead(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy in which whatever makes a dropped unit makes zeros; what reads it is left alone."""
    copied = without_norms(copy.deepcopy(model))
    tensors = tensors_of(copied, model)
    with torch.no_grad():
        for cut in plan.cuts:
            for part in cut.producers:
                if part.tensor in tensors and part.role != "kernel":
                    places = torch.tensor(dropped(cut, part), dtype=torch.long)
                    tensors[part.tensor].index_fill_(part.axis, places, 0)
    return copied


def tensors_of(model: nn.Module, normed: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those whose norms were taken off also under the names that they had with them."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = [name for name, _ in normed.named_parameters()]
    for end in ("weight_v", "weight_orig", "parametrizations.weight.original", "parametrizations.weight.original1"):
        tensors |= {name: tensors[name.removesuffix(end) + "weight"] for name in before if name.endswith(end)}
    return tensors


def cut(model: nn.Module, plan: Plan, groups: Traced, inputs: Any) -> tuple[nn.Module, Plan]:
    """A cut and repaired copy; groups whose sizes can't follow are named, and left out."""
    for _ in range(len(plan.cuts) + 1):
        small = copy.deepcopy(model)
        surgery.apply(plan, small)
        try:
            rewrite_stale_sizes(small, plan, groups, inputs)
        except UnrepairableError as error:
            left = tuple(entry for entry in plan.cuts if entry.group not in error.groups)
            if len(left) == len(plan.cuts):
                raise
            plan = Plan(left)
        else:
            break
    return small, plan


def check(model: nn.Module, inputs: Any, seed: int = 0, share: float = 0.5) -> Traced:
    """Trace, cut every free group, repair; an exact cut must equal the masked network in float64."""
    model = randomise(model, seed)
    groups = trace(model, inputs)
    _, plan = cut(model, half(groups, seed, share), groups, inputs)
    exact = Plan(tuple(entry for entry in plan.cuts if groups.by_name[entry.group].exact))
    small, exact = cut(model, exact, groups, inputs)
    for got, expected in zip(call(small, inputs), call(masked(model, exact), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    return groups


def free(groups: Traced) -> dict[str, int]:
    return {group.name: group.size for group in groups if group.frozen is None}


def part(groups: Traced, group: str, tensor: str, axis: int) -> tuple[int, ...]:
    """The unit at every position of a tensor's axis."""
    slices = groups.by_name[group].producers + groups.by_name[group].consumers
    (found,) = [entry for entry in slices if (entry.tensor, entry.axis) == (tensor, axis)]
    return found.units
