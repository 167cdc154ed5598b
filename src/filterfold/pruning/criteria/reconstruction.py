"""The criterion that asks what the next layers can't make good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...plan import ChannelGroup, Slice
from ...utils.inputs import batch_of, call
from ...utils.model_state import preserved
from ...utils.modules import named_tensors
from ..reconstruction.least_squares import RIDGES, Problem, best_ridge, exact, ridged
from ..reconstruction.operations import Key, Products
from ..reconstruction.passes import rows_for
from ..reconstruction.products import Product, Sample
from .registry import Batch, Evidence, criterion

_LARGEST = 8192
"""Inputs of a layer, at most: their products take 512 MiB."""


_TRAINED = 0.1
"""The ridge where training follows."""


_AT_ONCE = 64
"""Of so many units that are left, one goes at a time."""


class _Inputs:
    """The inputs X of one layer: XᵀX and their sums, in float64, for every group and half of the examples."""

    def __init__(self, weight: Tensor, channels: int) -> None:
        self.weight, self.channels = weight, channels
        self.centred = False
        groups, features, _ = weight.shape
        self._products = weight.new_zeros(2, groups, features, features)
        self._sums = weight.new_zeros(2, groups, features)
        self._counts = [0, 0]

    def add(self, x: Tensor, *, second: bool) -> None:
        """Add rows of one half: shape `(groups, rows, inputs)`."""
        self._products[int(second)] += x.mT @ x
        self._sums[int(second)] += x.sum(1)
        self._counts[second] += x.shape[1]

    def grams(self) -> list[Tensor]:
        """XᵀX of both halves, and of all, of the centred inputs where means are free."""
        halves = zip((*self._products, self._products.sum(0)), (*self._sums, self._sums.sum(0)), strict=True)
        counts = (*self._counts, sum(self._counts))
        return [
            gram - sums[:, :, None] * sums[:, None, :] / max(count, 1) if self.centred else gram
            for (gram, sums), count in zip(halves, counts, strict=True)
        ]


class _Reader:
    """One layer that reads a group: what it loses with each unit when the others make good what they can.

    With X its centred inputs, W its kernels and H = (XᵀX + λ)⁻¹, leaving out the inputs b and solving the others anew
    costs tr(W_bᵀ H_bb⁻¹ W_b); then W and H are those of the layer without b (Hassibi & Stork 1993, equations 5 and 9,
    for blocks of weights and for all outputs at once). Unless λ is given, it is the ridge of `RIDGES` that serves best
    where every second unit is left out: the others are solved anew on half of the examples, and judged on the other
    half.
    """

    def __init__(
        self, units: Sequence[int], weight: Tensor, grams: Sequence[Tensor], energy: float, ridge: float | None
    ) -> None:
        self.energy = energy
        each = weight.shape[1] // len(units)  # kernel positions of a channel
        owned: dict[int, list[int]] = {}
        for place, unit in enumerate(units):
            if unit >= 0:
                owned.setdefault(unit, []).extend(range(place * each, (place + 1) * each))
        self.owned = owned
        self.weight = weight
        *halves, gram = grams
        ridge = self._best_ridge(halves) if ridge is None else ridge
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(gram, ridge, len(gram[0]))))

    def _best_ridge(self, halves: Sequence[Tensor]) -> float:
        gone = sorted(place for unit in sorted(self.owned)[1::2] for place in self.owned[unit])
        left, at = (self._index(places) for places in (sorted({*range(self.weight.shape[1])} - {*gone}), gone))
        lost = self.weight[:, at]
        problems = []
        for gram in halves:
            columns = gram[:, :, at] @ lost
            error = float((lost * columns[:, at]).sum())
            problems.append(Problem(gram[:, left][:, :, left], columns[:, left], error, len(left)))
        return min(best_ridge(problems), RIDGES[1])

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
        return torch.tensor(places, device=self.weight.device, dtype=torch.int64)


class _Gather(Products):
    """Adds up what the layers that read groups are given by `examples` examples, a `share` of all."""

    def __init__(
        self, model: nn.Module, found: dict[Key, _Inputs], wanted: set[str], examples: int, share: float
    ) -> None:
        super().__init__(model)
        self._found, self._wanted, self._examples, self._share = found, wanted, examples, share

    def before(self, key: Key, product: Product) -> None:
        """Add up a sample of rows."""
        kernel = product.form(product.weight)
        if key[0] not in self._wanted or kernel.shape[1] > _LARGEST:
            return
        inputs = self._found.setdefault(key, _Inputs(exact(kernel).contiguous(), product.channels))
        inputs.centred |= product.bias is not None
        rows = ceil(rows_for(kernel.shape[1]) * self._share)
        sample = Sample.draw(product, rows, examples=self._examples, seed=len(self._found))
        for piece, data in product.inputs(sample):
            inputs.add(exact(data), second=piece.second)


def _gathered(
    model: nn.Module, wanted: set[str], batches: Iterable[Batch]
) -> tuple[dict[Key, _Inputs], dict[str, str]]:
    """The inputs of the layers whose kernels these are; and what else reads parameters."""
    found: dict[Key, _Inputs] = {}
    others: dict[str, str] = {}
    images = [inputs for inputs, _ in batches]
    counts = [batch_of(inputs) or 1 for inputs in images]
    for inputs, count in zip(images, counts, strict=True):
        with (
            preserved(model),
            torch.inference_mode(),
            _Gather(model, found, wanted, count, count / sum(counts)) as watch,
        ):
            call(model, inputs)
        others |= watch.others
        for key in watch.normed & found.keys():
            found[key].centred = True
    return found, others


def _losses(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Batch], _loss: Any, ridge: float | None = None
) -> Evidence:
    """Group name → what the layers behind it lose with each unit, shape `(size,)`."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model)}
    tensors = dict(named_tensors(model))
    inputs, others = _gathered(model, {names[part.tensor] for part in _kernels(groups)}, batches)
    found = {}
    for group in groups:
        readers, why = [], []
        for part in _kernels([group]):
            entries = [entry for key, entry in inputs.items() if key[0] == names[part.tensor]]
            own = [reader for entry in entries for reader in _readers(part.units, entry, ridge)]
            readers += own
            if not own:
                size = tensors[part.tensor][0].numel()
                reason = f"{others.get(names[part.tensor], 'no layer that can be solved')} reads it"
                why.append(f"{part.tensor}: " + (reason if size <= _LARGEST else f"more than {_LARGEST} inputs"))
        if not readers:
            reason = "; ".join(why) or "no layer reads it"
            raise ConfigError(f"criterion 'reconstruction' can't score group {group.name!r} ({reason}): ignore it")
        found[group.name] = _eliminated(group.size, readers)
    return found


def _kernels(groups: Iterable[ChannelGroup]) -> list[Slice]:
    return [part for group in groups for part in group.consumers if part.role == "kernel"]


def _readers(units: Sequence[int], inputs: _Inputs, ridge: float | None) -> list[_Reader]:
    """One reader; one for each group of a convolution whose groups read different units; none where they don't fit."""
    grams, weight = inputs.grams(), inputs.weight
    energy = float((weight * (grams[-1] @ weight)).sum()) or 1.0
    size, groups = inputs.channels, len(weight)
    if groups > 1 and len(units) == groups * size:
        parts = ((slice(group, group + 1), units[group * size : (group + 1) * size]) for group in range(groups))
        return [_Reader(own, weight[one], [gram[one] for gram in grams], energy, ridge) for one, own in parts]
    return [_Reader(units, weight, grams, energy, ridge)] if weight.shape[1] % len(units) == 0 else []


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


@criterion("reconstruction", gather=_losses, across_layers=True)
def reconstruction(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """What the next layers lose with a unit after they have been solved anew for the units that are left.

    Units are left out one by one, each time the one whose loss can best be made good by the others: backward
    elimination by the error ‖X W - X_S W'‖² / ‖X W‖² of the layers that read the group (summed over them), W' the
    least-squares kernels for what is left. ThiNet (Luo et al., ICCV 2017, equation 6) chooses channels by the error of
    the next layer with its kernels as they are; here the kernels are re-solved at each step, as the optimal brain
    surgeon does for single weights (Hassibi & Stork 1993). Made for cuts that `repair` follows, and no training: a
    layer whose new kernels can't be told from so few images counts as one that can't do without its units.
    """
    return evidence[group.name]


@criterion("reconstruction-then-train", gather=partial(_losses, ridge=_TRAINED), across_layers=True)
def reconstruction_then_train(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """`reconstruction` for cuts that training follows, on far more images than the criterion sees.

    What training will find need not be told from the few images here, so every layer gets the same weak ridge, .1,
    instead of one that is judged on images left out. Deep layers with small maps then give more.
    """
    return evidence[group.name]
