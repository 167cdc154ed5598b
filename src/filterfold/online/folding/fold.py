"""From clusters to a plan: each cluster becomes one filter, and the kernels that read it are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import SelectionError
from ...plan import DROPPED, ChannelGroup, Cut, Plan, Slice
from ...pruning.budgets.patterns import suggestion
from ...utils.arguments import typed
from ...utils.modules import named_tensors, unwrap
from ..clustering import directions
from .units import ProducerLayer, filter_slices, importance, only_norm, producer_layers, rows_of, sign_of

_NODES = 24


def regression(
    gamma: Tensor, beta: Tensor, own_gamma: Tensor, own_beta: Tensor, cosine: Tensor, otherwise: Tensor
) -> Tensor:
    """Factors, shape `(n,)`, never negative.

    **Arguments**, all of shape `(n,)` in float64:

    - `gamma`, `beta`: scale and shift of the units.
    - `own_gamma`, `own_beta`: those of each unit's representative.
    - `cosine`: between the filters of unit and representative.
    - `otherwise`: what to return where the representative's output hardly varies.

    >>> one, half = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    >>> zero = 0 * one
    >>> regression(2 * one, zero, one, zero, one, one).item(), regression(one, zero, one, zero, half, one).item()
    (2.0, 0.43...)
    """
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(_NODES))
    first, second = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).reshape(-1, 1) / weights.sum() ** 2
    cosine = cosine.clamp(-1, 1)
    made = torch.relu(own_gamma * first + own_beta)
    unit = torch.relu(gamma * (cosine * first + (1 - cosine.square()).sqrt() * second) + beta)
    centred = made - (weight * made).sum(dim=0)
    variance = (weight * centred.square()).sum(dim=0)
    factor = (weight * centred * unit).sum(dim=0) / variance.where(variance > 0, 1)
    size = own_gamma.square() + own_beta.square()
    return torch.where(variance > 1e-6 * size, factor.clamp(min=0), otherwise)


Rule = Literal["raw", "normed", "chain", "plain"]
"""What makes a group's units: filters alone ("raw"); filters, each with batch norms behind it ("normed"); one filter,
then depthwise filters and batch norms in turn ("chain"); or anything else, where members are averaged as they are."""


Gain = Literal["scale", "regression"]


def fold(
    groups: Sequence[ChannelGroup],
    labels: Mapping[str, Sequence[int] | Tensor],
    model: nn.Module,
    *,
    representative: Literal["mean", "member"] = "mean",
    weighted: bool = True,
    gain: Gain = "scale",
) -> Plan:
    """Turn clusters into a plan that folds each into one unit.

    **Arguments:**

    - `groups`: the traced groups; those without labels stay as they are.
    - `labels`: group name → cluster of each unit, shape `(size,)`, any numbering.
    - `model`: read for the units' scales; not changed.
    - `representative`: `"mean"` of the members' directions, or the `"member"` nearest to it.
    - `weighted`: let members count in the mean by their `importance`.
    - `gain`: each member's factor on the next kernels: its `"scale"`, or where the group is one filter with one batch
      norm the `"regression"` of its output on the representative's (see `regression`), which is better once the next
      batch norms have seen data, and the same for equal units.

    **Returns:** a `Plan` whose slices carry the shares of the members (`Slice.weight`) and whose cuts carry each
    member's factor on the next layers' kernels (`Cut.gain`).

    **Raises:** `SelectionError` as `from_clusters` does.

    ```python
    >>> from filterfold.plan import ChannelGroup
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    >>> made, read = Slice("0.weight", 0, (0, 1), "filter"), Slice("2.weight", 1, (0, 1), "kernel")
    >>> group = ChannelGroup("0", 2, (made,), (read,), True, None, (0, 0), (0, 0))
    >>> [round(gain, 3) for gain in fold([group], {"0": [0, 0]}, net).cuts[0].gain]
    [0.5, 1.5]

    ```
    """
    model = unwrap(model)
    tensors, modules = dict(named_tensors(model)), dict(model.named_modules(remove_duplicate=False))
    named = {group.name: group for group in groups}
    clusters = {name: torch.unique(torch.as_tensor(given), return_inverse=True)[1] for name, given in labels.items()}
    cuts = []
    for cut in from_clusters(groups, clusters).cuts:
        units = _Units(named[cut.group], tensors, modules)
        rule = _RULES.get(units.rule)
        if cut.folds and rule is not None:
            mean = _Means(cut, units, weighted=weighted, nearest=representative == "member")
            weights, gains = rule(units, mean, gain == "regression")
            producers = tuple(
                replace(piece, weight=mean.listed(weights[piece.tensor])) if piece.tensor in weights else piece
                for piece in cut.producers
            )
            cut = replace(cut, producers=producers, gain=mean.listed(gains))
        cuts.append(cut)
    notes = {"method": "fold", "representative": representative, "weighted": weighted, "gain": gain}
    return Plan(tuple(cuts), notes=notes)


def rule_of(layers: Sequence[ProducerLayer], modules: Mapping[str, nn.Module]) -> Rule:
    """Which of the cases of `Rule` the producing layers are."""
    filters, depthwise, norms = (
        [layer for layer in layers if layer.kind == kind] for kind in ("filter", "depthwise", "norm")
    )
    if not norms:
        return "plain" if depthwise else "raw"
    # Batch and instance norm have the attribute (it may be None); layer and group norm, which mix channels, don't.
    if not all(hasattr(modules.get(norm.name), "running_var") for norm in norms):
        return "plain"
    if depthwise:
        return "chain" if len(filters) <= 1 else "plain"
    return "normed"


class _Units:
    """What a group's units are made of, in float64 on the CPU: n numbers a layer."""

    def __init__(self, group: ChannelGroup, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        self.group, self.tensors = group, tensors
        layers = producer_layers(group.producers)
        self.rule = rule_of(layers, modules)
        self.filters = [layer for layer in layers if layer.kind in ("filter", "depthwise")]
        self.norms = [layer for layer in layers if layer.kind == "norm"]
        self.filter_slices = [piece for layer in layers for piece in filter_slices(layer)]
        self.only_norm = only_norm(layers)
        self.eps = {norm.name: float(getattr(modules.get(norm.name), "eps", 0.0)) for norm in self.norms}
        self._known: dict[str, Tensor] = {}
        self.sign = torch.ones(group.size, dtype=torch.float64)
        if self.only_norm is not None and "weight" in self.only_norm.slices and self.rule != "plain":
            self.sign = sign_of(self.rows(self.only_norm.slices["weight"])[:, 0])

    def rows(self, piece: Slice) -> Tensor:
        """Entries of all units in a slice, as `rows_of` gives them."""
        if piece.tensor not in self._known:
            self._known[piece.tensor] = rows_of(piece, self.group.size, self.tensors).double().cpu()
        return self._known[piece.tensor]

    def length(self, pieces: Sequence[Slice]) -> Tensor:
        """Length of the units' entries in several slices together; 1 where there are none."""
        rows = [self.rows(piece) for piece in pieces]
        return torch.cat(rows, dim=1).norm(dim=1) if rows else torch.ones_like(self.sign)

    def affine(self, norms: Sequence[ProducerLayer]) -> Tensor:
        """Length of the units' scales and shifts in some norms."""
        return self.length([norm.slices[leaf] for norm in norms for leaf in ("weight", "bias") if leaf in norm.slices])

    def deviation(self, norm: ProducerLayer) -> Tensor:
        """What a norm divides the units by."""
        if "running_var" not in norm.slices:
            return torch.ones_like(self.sign)
        return (self.rows(norm.slices["running_var"])[:, 0] + self.eps[norm.name]).clamp(min=1e-300).sqrt()


class _Means:
    """Weighted means over the clusters of a group's units."""

    def __init__(self, cut: Cut, units: _Units, *, weighted: bool, nearest: bool) -> None:
        self.labels, self.count = torch.tensor(cut.assignment), cut.new_size
        size = torch.bincount(self.labels, minlength=self.count).double()[self.labels]
        self.alone = size == 1
        self.nearest = self._nearest(units)
        self.share = self.nearest if nearest else self._shares(units, 1 / size, weighted)

    def total(self, values: Tensor) -> Tensor:
        """Sums over each cluster's members, shape `(count, …)`."""
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.labels, values)

    def scale(self, scale: Tensor) -> Tensor:
        """For every unit the mean scale of those members of its cluster that have one."""
        return (self.total(scale) / self.total((scale > 0).double()).clamp(min=1))[self.labels]

    def reference(self, values: Tensor) -> Tensor:
        """For every unit the value of its cluster's nearest member."""
        return self.total(values * self.nearest)[self.labels]

    def blend(self, scale: Tensor, target: Tensor | None = None) -> Tensor:
        """Shares that bring every member to one scale first (the mean); members of scale 0 have no say."""
        target = self.scale(scale) if target is None else target
        share = torch.where(scale > 0, self.share, 0)
        total = self.total(share)[self.labels]
        share = torch.where(total > 0, share / total.where(total > 0, 1), self.share)
        return share * torch.where(scale > 0, target / scale.where(scale > 0, 1), 1)

    def gain(self, scale: Tensor) -> Tensor:
        """Every unit's factor on the next kernels: its scale as a multiple of its cluster's."""
        mean = self.scale(scale)
        return torch.where(mean > 0, scale / mean.where(mean > 0, 1), 1)

    def listed(self, values: Tensor) -> tuple[float, ...]:
        """As plain numbers; units on their own are exactly themselves."""
        return tuple(values.where(~self.alone, 1).tolist())

    def _shares(self, units: _Units, plain: Tensor, weighted: bool) -> Tensor:
        """Every unit's share in its cluster's mean."""
        if not weighted:
            return plain
        weight = importance(units.group, units.tensors).double().cpu()
        total = self.total(weight)[self.labels]
        return torch.where(total > 0, weight / total.where(total > 0, 1), plain)

    def _nearest(self, units: _Units) -> Tensor:
        """1 for the member of each cluster nearest to its mean direction (the first of equals), else 0."""
        rows = [directions(units.rows(piece)) for piece in units.filter_slices]
        unit = torch.cat(rows or [torch.ones(len(self.labels), 1, dtype=torch.float64)], dim=1)
        fit = (unit * self.total(unit)[self.labels]).sum(dim=1)
        best = torch.full((self.count,), -torch.inf, dtype=torch.float64).scatter_reduce(0, self.labels, fit, "amax")
        near = (fit >= best[self.labels] - 1e-9).nonzero().squeeze(1)
        first = torch.full((self.count,), len(fit)).scatter_reduce(0, self.labels[near], near, "amin")
        return torch.zeros(len(fit), dtype=torch.float64).index_fill(0, first, 1)


Shares = tuple[dict[str, Tensor], Tensor]
"""Tensor name → share of every unit in its cluster's representative; and every unit's gain."""


def _raw(units: _Units, mean: _Means, _regress: bool) -> Shares:
    """Filters alone: all members at their mean length, which the next kernels make up for."""
    pieces = [piece for layer in units.filters for piece in layer.slices.values()]
    scale = units.length(pieces)
    return {piece.tensor: mean.blend(scale) for piece in pieces}, mean.gain(scale)


def _behind_norms(units: _Units, mean: _Means, regress: bool) -> Shares:
    """Batch norms behind filters: they normalise the filters' lengths away, and their own scales count.

    Inside a chain the next batch norm's variance, the nearest member's, includes the scale of the one before.
    """
    weights, stretch = _filter_shares(units, mean)
    chain = units.rule == "chain"
    for norm, longer in zip(units.norms, stretch, strict=True):
        scale = units.affine([norm])
        inside = chain and norm is not units.norms[-1]
        share = mean.blend(scale, mean.reference(scale) if inside else None)
        weights |= _norm_shares(units, mean, norm, share, longer)
    scale, only = units.affine(units.norms[-1:] if chain else units.norms), units.only_norm
    gain = mean.gain(scale)
    if regress and only is not None and {"weight", "bias"} <= only.slices.keys():
        gain = _regression_gain(units, mean, only, mean.blend(scale), gain)
    return weights, gain


_RULES: dict[str, Callable[[_Units, _Means, bool], Shares]] = {
    "raw": _raw,
    "normed": _behind_norms,
    "chain": _behind_norms,
}


def _filter_shares(units: _Units, mean: _Means) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Shares in filters whose scale is normalised away; for every norm, by how much the mean direction was stretched.

    The stretch is known where each filter has one norm, in the same order; elsewhere it is 1.
    """
    weights: dict[str, Tensor] = {}
    stretch = []
    for layer in units.filters:
        pieces = filter_slices(layer)
        scale = units.length(pieces)
        length = mean.reference(scale)  # that of the member whose variance the batch norm keeps
        share = mean.blend(scale, length) * units.sign * mean.reference(units.sign)
        longer = torch.ones_like(share)
        rows = torch.cat([units.rows(piece) for piece in pieces], dim=1)
        if rows.shape[1]:
            made = mean.total(rows * share[:, None]).norm(dim=1)[mean.labels]
            longer = torch.where(made > 1e-6 * length, length / made.clamp(min=1e-300), 1)
        stretch.append(longer)
        weights |= {piece.tensor: share * longer for piece in layer.slices.values()}
    paired = len(units.filters) == len(units.norms)
    return weights, stretch if paired else [torch.ones_like(units.sign)] * len(units.norms)


def _norm_shares(
    units: _Units, mean: _Means, norm: ProducerLayer, affine: Tensor, stretch: Tensor
) -> dict[str, Tensor]:
    """Shares in a batch norm's tensors."""
    flip = units.sign * mean.reference(units.sign)
    deviation = units.deviation(norm)
    shares = {
        "running_var": mean.nearest,
        "running_mean": mean.share * flip * stretch / deviation * mean.reference(deviation),
        "weight": affine * flip,
        "bias": affine,
    }
    return {piece.tensor: shares[leaf] for leaf, piece in norm.slices.items() if leaf in shares}


def _regression_gain(units: _Units, mean: _Means, norm: ProducerLayer, share: Tensor, otherwise: Tensor) -> Tensor:
    """Gains by regression of each member on its representative."""
    gamma, beta = units.rows(norm.slices["weight"]), units.rows(norm.slices["bias"])
    if gamma.shape[1] != 1:
        return otherwise
    gamma, beta = gamma[:, 0] * units.sign, beta[:, 0]
    unit = directions(units.rows(units.filter_slices[0])) * units.sign[:, None]
    centre = directions(mean.total(unit * mean.share[:, None]))[mean.labels]
    own = mean.total(share * gamma)[mean.labels], mean.total(share * beta)[mean.labels]
    return regression(gamma, beta, *own, (unit * centre).sum(dim=1), otherwise)


@typed
def from_clusters(groups: Iterable[ChannelGroup], labels: Mapping[str, Sequence[int] | Tensor]) -> Plan:
    """Turn cluster labels into a plan that folds every cluster into one unit.

    **Arguments:**

    - `groups`: what `filterfold.trace` found.
    - `labels`: group name → for every unit the label of its cluster (any ints), or -1 to drop it.
      Groups without labels are not part of the plan.

    **Returns:** a `Plan`; new units are in the order of their clusters' first members.

    **Raises:** `SelectionError` if a cluster spans two classes or two blocks, if blocks keep
    different numbers of units, if a class is left without a unit, or if the group is frozen.

    ```python
    >>> from filterfold.plan import ChannelGroup
    >>> group = ChannelGroup("conv", 4, (), (), True, None, (0,) * 4, (0,) * 4)
    >>> from_clusters([group], {"conv": [7, 2, 7, 5]}).cuts[0].assignment
    (0, 1, 0, 2)

    ```
    """
    named = {group.name: group for group in groups}
    cuts = []
    for name, values in labels.items():
        if name not in named:
            raise SelectionError(f"labels: no group is named {name!r}{suggestion(name, named)}")
        group = named[name]
        if group.frozen is not None:
            raise SelectionError(f"group {name!r} can't be folded: {group.frozen}")
        if len(values) != group.size:
            raise SelectionError(f"group {name!r}: {len(values)} labels for {group.size} units")
        given = torch.as_tensor(values).tolist()
        if not all(type(label) is int for label in given):
            raise SelectionError(f"group {name!r}: labels must be whole numbers")
        members: dict[int, list[int]] = {}
        for unit, label in enumerate(given):
            if label != DROPPED:
                members.setdefault(label, []).append(unit)
        _check_clusters(group, members)
        index = {label: new for new, label in enumerate(members)}
        assignment = tuple(index.get(label, DROPPED) for label in given)
        cuts.append(Cut(name, assignment, group.producers, group.consumers))
    return Plan(tuple(cuts))


def _check_clusters(group: ChannelGroup, members: Mapping[int, Sequence[int]]) -> None:
    where = f"group {group.name!r}"
    if not members:
        raise SelectionError(f"{where}: every unit is dropped; keep at least one")
    for label, units in members.items():
        for what, marks in (("class", group.classes), ("block", group.blocks)):
            if len({marks[unit] for unit in units}) > 1:
                raise SelectionError(
                    f"{where}: cluster {label} spans more than one {what}; cluster each {what} by itself"
                )
    classes = {group.classes[units[0]] for units in members.values()}
    if classes != set(group.classes):
        raise SelectionError(f"{where}: class {min(set(group.classes) - classes)} is left without a unit")
    kept = dict.fromkeys(group.blocks, 0)
    for units in members.values():
        kept[group.blocks[units[0]]] += 1
    if len(set(kept.values())) > 1:
        raise SelectionError(f"{where}: blocks keep {min(kept.values())} to {max(kept.values())} units; must be equal")
