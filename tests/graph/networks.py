"""Small networks for the constructs that real ConvNets use, and a check that a random cut of one is right."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from filterfold import surgery
from filterfold.graph import Traced, repair, trace
from filterfold.plan import Cut, Plan, keep_units


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
        cells: dict[tuple[int, int], list[int]] = {}
        for unit in range(group.size):
            cells.setdefault((group.classes[unit], group.blocks[unit]), []).append(unit)
        kept = {cell: rng.sample(units, max(1, int(len(units) * share))) for cell, units in cells.items()}
        if len(set(group.blocks)) > 1:
            least = min(len(units) for units in kept.values())
            kept = {cell: units[:least] for cell, units in kept.items()}
        chosen = [unit for units in kept.values() for unit in units]
        cuts.append(Cut(group.name, keep_units(group.size, chosen), group.producers, group.consumers))
    return Plan(tuple(cuts))


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
    copied = copy.deepcopy(model)
    tensors = dict([*copied.named_parameters(), *copied.named_buffers()])
    with torch.no_grad():
        for cut in plan.cuts:
            for part in cut.consumers:
                gone = [place for place, unit in enumerate(part.units) if unit >= 0 and cut.assignment[unit] < 0]
                tensors[part.tensor].index_fill_(part.axis, torch.tensor(gone, dtype=torch.long), 0)
    return copied


def check(model: nn.Module, inputs: Any, seed: int = 0, share: float = 0.5) -> Traced:
    """Trace, cut every free group, repair; an exact cut must equal the masked network in float64."""
    model = randomise(model, seed)
    groups = trace(model, inputs)
    plan = half(groups, seed, share)
    exact = Plan(tuple(cut for cut in plan.cuts if groups.by_name[cut.group].exact))
    for candidate in (plan, exact):
        small = copy.deepcopy(model)
        surgery.apply(candidate, small)
        repair(small, candidate, groups, inputs)
        outputs = call(small, inputs)
    for got, expected in zip(outputs, call(masked(model, exact), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    return groups


def free(groups: Traced) -> dict[str, int]:
    return {group.name: group.size for group in groups if group.frozen is None}


def part(groups: Traced, group: str, tensor: str, axis: int) -> tuple[int, ...]:
    """The unit at every position of a tensor's axis."""
    slices = groups.by_name[group].producers + groups.by_name[group].consumers
    (found,) = [entry for entry in slices if (entry.tensor, entry.axis) == (tensor, axis)]
    return found.units
