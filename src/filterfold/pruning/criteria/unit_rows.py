"""From slices to one row per unit, and from the scores of several slices to one score per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan import ChannelGroup, Slice

Combine = Literal["sum", "mean", "max", "first"]


COMBINE: tuple[Combine, ...] = ("sum", "mean", "max", "first")


def filters(group: ChannelGroup) -> tuple[Slice, ...]:
    """The slices that stand for a group's filters.

    These are its `filter` slices; where those don't make every unit (channels that are made by
    parameters alone), the `kernel` slices that read it.

    **Raises:** `ConfigError` if neither covers every unit.
    """
    for parts, role in ((group.producers, "filter"), (group.consumers, "kernel")):
        chosen = tuple(part for part in parts if part.role == role)
        if set(range(group.size)) <= {unit for part in chosen for unit in part.units}:
            return chosen
    raise ConfigError(f"group {group.name!r} has units that no filter makes or reads: ignore it, or score it yourself")


def unit_rows(part: Slice, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """All values of a tensor that belong to each unit.

    **Arguments:**

    - `part`: a slice of that tensor.
    - `tensor`: any shape; half precision is widened.

    **Returns:** the units that occur, ascending, shape `(n,)`; and their values, shape `(n, d)`,
    padded with zeros where units have different numbers of positions.

    ```python
    >>> unit_rows(Slice("w", 1, (1, -1, 0, 1), "filter"), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    (tensor([0, 1]), tensor([[3., 0.],
            [1., 4.]]))

    ```
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.detach().movedim(part.axis, 0).reshape(len(part.units), -1).to(wide)
    labels = torch.tensor(part.units, device=tensor.device)
    if torch.equal(labels, torch.arange(len(labels), device=tensor.device)):
        return labels, rows
    positions = torch.nonzero(labels >= 0).squeeze(1)
    positions = positions[torch.argsort(labels[positions], stable=True)]
    units, row, counts = torch.unique_consecutive(labels[positions], return_inverse=True, return_counts=True)
    place = torch.arange(len(positions), device=tensor.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if len(counts) else 0
    if len(positions) == most * len(units):
        return units, rows.index_select(0, positions).reshape(len(units), -1)
    padded = rows.new_zeros(len(units), most, rows.shape[1])
    padded[row, place] = rows[positions]
    return units, padded.flatten(1)


def combined(group: ChannelGroup, scored: Iterable[tuple[Tensor, Tensor]], combine: Combine = "sum") -> Tensor:
    """One score per unit from the scores of several slices.

    **Arguments:**

    - `group`: whose units are scored.
    - `scored`: for every slice the units that occur in it and their scores, both of shape `(n,)`.
    - `combine`: `"sum"`, `"mean"` or `"max"` over the slices that a unit occurs in, or `"first"` of
      them (Li et al. 2017 rank a coupled stage by one of its layers).

    **Returns:** float64 scores of shape `(size,)` on the CPU.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    times = torch.zeros(group.size, dtype=torch.float64)
    for units, scores in scored:
        units, scores = units.cpu(), scores.detach().double().cpu()
        fresh = times[units] == 0
        if combine == "first":
            total[units[fresh]] = scores[fresh]
        elif combine == "max":
            total[units] = torch.where(fresh, scores, torch.maximum(total[units], scores))
        else:
            total[units] += scores
        times[units] += 1
    if bool((times == 0).any()):
        unit = int((times == 0).nonzero()[0])
        raise ConfigError(f"group {group.name!r}: nothing to score unit {unit} by; choose another criterion")
    return total / times if combine == "mean" else total


def over_filters(
    group: ChannelGroup,
    tensors: Mapping[str, Tensor],
    score: Callable[[Tensor], Tensor],
    combine: Combine,
    parts: Sequence[Slice] | None = None,
) -> Tensor:
    """Apply `score`: rows `(n, d)` → `(n,)` to every filter slice of the group, and combine."""
    rows = (unit_rows(part, tensors[part.tensor]) for part in (filters(group) if parts is None else parts))
    return combined(group, ((units, score(values)) for units, values in rows), combine)
