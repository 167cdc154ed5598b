"""The criterion that asks what the next layers can't make good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...plan import ChannelGroup, Slice
from ...utils.inputs import call
from ...utils.model_state import preserved
from ..reconstruction import Inputs, observed, ridged, unsolvable
from .registry import Batch, Evidence, criterion

RIDGE = 1e-3
"""Weight of staying near the present kernels, relative to the inputs' mean square: the default of `repair`."""


_LARGEST = 8192
"""Inputs of a layer, at most: their products take 512 MiB."""


_AT_ONCE = 64
"""Of so many units that are left, one goes at a time."""


class _Reader:
    """One layer that reads a group: what it loses with each unit when the others make good what they can.

    With X its centred inputs, W its kernels and H = (XᵀX + λ)⁻¹, leaving out the inputs b and solving the others anew
    costs tr(W_bᵀ H_bb⁻¹ W_b); then W and H are those of the layer without b (Hassibi & Stork 1993, equations 5 and 9,
    for blocks of weights and for all outputs at once).
    """

    def __init__(self, part: Slice, module: Any, inputs: Inputs) -> None:
        weight = inputs.kernels(module)
        gram = inputs.gram()
        self.energy = float((weight * (gram @ weight)).sum()) or 1.0
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(gram, RIDGE)))
        self.weight = weight
        each = weight.shape[1] // len(part.units)  # kernel positions of a channel
        owned: dict[int, list[int]] = {}
        for place, unit in enumerate(part.units):
            if unit >= 0:
                owned.setdefault(unit, []).extend(range(place * each, (place + 1) * each))
        self.owned = owned

    def costs(self, units: Sequence[int]) -> Tensor:
        """Loss of each unit, as a share of the layer's output: shape `(len(units),)`."""
        found = torch.zeros(len(units), dtype=torch.float64)
        sizes: dict[int, list[int]] = {}
        for index, unit in enumerate(units):
            if unit in self.owned:
                sizes.setdefault(len(self.owned[unit]), []).append(index)
        for indices in sizes.values():
            at = self._index([self.owned[units[index]] for index in indices])
            block, rows = self.inverse[:, at[:, :, None], at[:, None, :]], self.weight[:, at]
            lost = (rows * torch.linalg.solve(block, rows)).sum((0, 2, 3)) / self.energy
            found[torch.tensor(indices)] = lost.cpu()
        return found

    def remove(self, units: Iterable[int]) -> None:
        """Leave the units out, and solve the rest."""
        gone = [place for unit in units for place in self.owned.pop(unit, ())]
        if not gone or not self.owned:
            return
        left = sorted({*range(self.weight.shape[1])} - {*gone})
        at, rest = self._index(gone), self._index(left)
        columns = self.inverse[:, rest][:, :, at]
        change = torch.linalg.solve(
            self.inverse[:, at][:, :, at], torch.cat((self.inverse[:, at][:, :, rest], self.weight[:, at]), 2)
        )
        self.inverse = self.inverse[:, rest][:, :, rest].baddbmm_(columns, change[:, :, : len(left)], alpha=-1)
        self.weight = self.weight[:, rest].baddbmm_(columns, change[:, :, len(left) :], alpha=-1)
        new = {place: index for index, place in enumerate(left)}
        self.owned = {unit: [new[place] for place in places] for unit, places in self.owned.items()}

    def _index(self, places: Any) -> Tensor:
        return torch.tensor(places, device=self.weight.device)


def _losses(model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Batch], _loss: Any) -> Evidence:
    """Group name → what the layers behind it lose with each unit, shape `(size,)`."""
    modules: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for part in _kernels(groups):
        name, _, leaf = part.tensor.rpartition(".")
        module: Any = model.get_submodule(name)
        reason = unsolvable(module, leaf, model)
        if reason is None and (size := module.weight[0].numel()) > _LARGEST:
            reason = f"it has {size} inputs, more than {_LARGEST}"
        if reason is None:
            modules[name] = module
        else:
            reasons[part.tensor] = reason
    with preserved(model), torch.no_grad(), observed(model, modules) as inputs:
        for batch, _ in batches:
            call(model, batch)
    found = {}
    for group in groups:
        readers, why = [], []
        for part in _kernels([group]):
            name = part.tensor.rpartition(".")[0]
            if name in inputs:
                readers.append(_Reader(part, modules[name], inputs[name]))
            else:
                why.append(f"{part.tensor}: {reasons.get(part.tensor, 'did not run')}")
        if not readers:
            reason = "; ".join(why) or "no layer reads it"
            raise ConfigError(f"criterion 'reconstruction' can't score group {group.name!r} ({reason}): ignore it")
        found[group.name] = _eliminated(group.size, readers)
    return found


def _kernels(groups: Iterable[ChannelGroup]) -> list[Slice]:
    return [part for group in groups for part in group.consumers if part.role == "kernel"]


def _eliminated(size: int, readers: Sequence[_Reader]) -> Tensor:
    """Leave out the unit that is missed least, again and again; what each one cost, never less than the one before."""
    scores = torch.zeros(size, dtype=torch.float64)
    left, last = list(range(size)), 0.0
    while left:
        costs = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        order = torch.argsort(costs, stable=True)[: max(1, len(left) // _AT_ONCE)].tolist()
        for index in order:
            last = max(float(costs[index]), last * (1 + 1e-9) + 1e-300)  # ties would lose the order
            scores[left[index]] = last
        gone = [left[index] for index in order]
        for reader in readers:
            reader.remove(gone)
        left = [unit for unit in left if unit not in gone]
    return scores


@criterion("reconstruction", gather=_losses)
def reconstruction(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """What the next layers lose with a unit after they have been solved anew for the units that are left.

    Units are left out one by one, each time the one whose loss can best be made good by the others: backward
    elimination by the error ‖X W - X_S W'‖² / ‖X W‖² of the layers that read the group (summed over them), W' the
    least-squares kernels for what is left. ThiNet (Luo et al., ICCV 2017, equation 6) chooses channels by the error of
    the next layer with its kernels as they are; here the kernels are re-solved at each step, as the optimal brain
    surgeon does for single weights (Hassibi & Stork 1993). Made for cuts that `repair` follows.
    """
    return evidence[group.name]
