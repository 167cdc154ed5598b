"""From clusters to a plan: each cluster becomes one filter, and the kernels that read it are summed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import PlanError, SelectionError
from ...plan import DROPPED, ChannelGroup, Cut, Plan, Slice
from ...pruning.budgets.patterns import suggestion
from ...pruning.budgets.ranking import parts
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
      norm the `"regression"` of its output on the representative's (see `gain.py`), which is better once the next
      batch norms have seen data, and the same for equal units.

    **Returns:** a `Plan` whose slices carry the shares of the members (`Slice.weight`) and whose cuts carry each
    member's factor on the next layers' kernels (`Cut.gain`).

    **Raises:** `PlanError` if a cluster mixes units that can't be folded, or a name is unknown.

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
    named = {group.name: group for group in groups}
    tensors, modules = dict(named_tensors(model)), dict(model.named_modules(remove_duplicate=False))
    cuts = []
    for name, given in labels.items():
        if name not in named:
            raise PlanError(f"labels for group {name!r}, which the model does not have")
        group = named[name]
        assignment = _assignment(group, given)
        cuts.append(_Fold(group, assignment, tensors, modules, representative, weighted, gain).cut())
    notes = {"method": "fold", "representative": representative, "weighted": weighted, "gain": gain}
    return Plan(tuple(cuts), notes=notes)


def rule_of(makers: Sequence[ProducerLayer], modules: Mapping[str, nn.Module]) -> Rule:
    """Which of the module docstring's cases the producing layers are."""
    filters, depthwise, norms = ([m for m in makers if m.kind == kind] for kind in ("filter", "depthwise", "norm"))
    if not norms:
        return "plain" if depthwise else "raw"
    # Batch and instance norm have the attribute (it may be None); layer and group norm, which mix channels, don't.
    if not all(hasattr(modules.get(norm.name), "running_var") for norm in norms):
        return "plain"
    if depthwise:
        return "chain" if len(filters) <= 1 else "plain"
    return "normed"


class _Fold:
    """One group's cut: scales first, then every slice's shares. All in float64 on the CPU: n numbers a layer."""

    def __init__(
        self,
        group: ChannelGroup,
        assignment: Tensor,
        tensors: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        representative: str,
        weighted: bool,
        gain: Gain,
    ) -> None:
        self.group, self.labels, self.tensors, self.modules = group, assignment, tensors, modules
        self.count = int(assignment.max()) + 1
        self.makers = producer_layers(group.producers)
        self.rule = rule_of(self.makers, modules)
        self.size = torch.bincount(assignment, minlength=self.count).double()
        self.alone = self.size[assignment] == 1
        self.nearest = self._nearest()
        self.share = self.nearest if representative == "member" else self._shares(weighted)
        self.regress = gain == "regression"
        norm = only_norm(self.makers)
        self.sign = torch.ones(group.size, dtype=torch.float64)
        if norm is not None and "weight" in norm.slices and self.rule != "plain":
            self.sign = sign_of(self._rows(norm.slices["weight"])[:, 0])

    def cut(self) -> Cut:
        """The group's cut."""
        group = self.group
        cut = Cut(group.name, tuple(self.labels.tolist()), group.producers, group.consumers)
        if not cut.folds or self.rule == "plain":
            return cut
        weights, gain = self._weights()
        producers = tuple(
            replace(piece, weight=self._listed(weights[piece.tensor])) if piece.tensor in weights else piece
            for piece in group.producers
        )
        return replace(cut, producers=producers, gain=self._listed(gain))

    def _weights(self) -> tuple[dict[str, Tensor], Tensor]:
        """Tensor name → share of every unit in its cluster's representative, and every unit's gain."""
        weights: dict[str, Tensor] = {}
        norms = [maker for maker in self.makers if maker.kind == "norm"]
        filters = [maker for maker in self.makers if maker.kind in ("filter", "depthwise")]
        if self.rule == "raw":
            scale = self._joint([piece for maker in filters for piece in maker.slices.values()])
            for maker in filters:
                weights |= {piece.tensor: self._blend(scale) for piece in maker.slices.values()}
            return weights, self._gain(scale)
        stretch = {}
        for maker in filters:
            share, stretch[maker.name] = self._filter(maker)
            weights |= {piece.tensor: share for piece in maker.slices.values()}
        joint = self._joint([norm.slices[leaf] for norm in norms for leaf in ("weight", "bias") if leaf in norm.slices])
        paired = len(filters) == len(norms)
        for index, norm in enumerate(norms):
            scale = self._joint([norm.slices[leaf] for leaf in ("weight", "bias") if leaf in norm.slices])
            joint = scale if self.rule == "chain" else joint
            longer = stretch[filters[index].name] if paired else torch.ones_like(self.sign)
            # Inside a chain the next batch norm's variance, the nearest member's, includes this scale.
            target = self._reference(scale) if self.rule == "chain" and norm is not norms[-1] else None
            weights |= self._norm(norm, self._blend(joint, target), longer)
        only = only_norm(self.makers)
        if self.regress and only is not None and {"weight", "bias"} <= only.slices.keys():
            return weights, self._regression(only, self._blend(joint), self._gain(joint))
        return weights, self._gain(joint)

    def _shares(self, weighted: bool) -> Tensor:
        """Every unit's share in its cluster's mean."""
        plain = (1 / self.size)[self.labels]
        if not weighted:
            return plain
        weight = torch.zeros_like(plain)
        for part in parts(self.group):
            weight[torch.tensor(part.units)] = importance(self.group, part, self.tensors).double().cpu()
        total = self._sum(weight)[self.labels]
        return torch.where(total > 0, weight / total.where(total > 0, 1), plain)

    def _filter(self, maker: ProducerLayer) -> tuple[Tensor, Tensor]:
        """Shares of a filter whose scale is normalised away, and by how much the mean direction was stretched."""
        scale = self._joint(list(filter_slices(maker)))
        length = self._reference(scale)  # that of the member whose variance the batch norm keeps
        share = self._blend(scale, length) * self.sign * self._reference(self.sign)
        stretch = torch.ones_like(share)
        rows = torch.cat([self._rows(piece) for piece in filter_slices(maker)], dim=1)
        if rows.shape[1]:
            made = self._sum(rows * share[:, None]).norm(dim=1)
            made = made[self.labels]
            stretch = torch.where(made > 1e-6 * length, length / made.clamp(min=1e-300), 1)
        return share * stretch, stretch

    def _norm(self, norm: ProducerLayer, affine: Tensor, stretch: Tensor) -> dict[str, Tensor]:
        flip = self.sign * self._reference(self.sign)
        weights = {}
        for leaf, piece in norm.slices.items():
            if leaf == "running_var":
                weights[piece.tensor] = self.nearest
            elif leaf == "running_mean":
                weights[piece.tensor] = self.share * flip * stretch / self._deviation(norm)
                weights[piece.tensor] *= self._reference(self._deviation(norm))
            elif leaf == "weight":
                weights[piece.tensor] = affine * flip
            elif leaf == "bias":
                weights[piece.tensor] = affine
        return weights

    def _deviation(self, norm: ProducerLayer) -> Tensor:
        if "running_var" not in norm.slices:
            return torch.ones_like(self.sign)
        variance = self._rows(norm.slices["running_var"])[:, 0]
        return (variance + float(getattr(self.modules[norm.name], "eps", 0.0))).clamp(min=1e-300).sqrt()

    def _blend(self, scale: Tensor, target: Tensor | None = None) -> Tensor:
        """Shares that bring every member to one scale first (the mean); members of scale 0 have no say."""
        target = self._mean(scale)[self.labels] if target is None else target
        share = torch.where(scale > 0, self.share, 0)
        total = self._sum(share)[self.labels]
        share = torch.where(total > 0, share / total.where(total > 0, 1), self.share)
        return share * torch.where(scale > 0, target / scale.where(scale > 0, 1), 1)

    def _gain(self, scale: Tensor) -> Tensor:
        mean = self._mean(scale)[self.labels]
        return torch.where(mean > 0, scale / mean.where(mean > 0, 1), 1)

    def _regression(self, norm: ProducerLayer, share: Tensor, otherwise: Tensor) -> Tensor:
        """Gains by regression of each member on its representative."""
        gamma, beta = self._rows(norm.slices["weight"]), self._rows(norm.slices["bias"])
        if gamma.shape[1] != 1:
            return otherwise
        gamma, beta = gamma[:, 0] * self.sign, beta[:, 0]
        unit = (
            directions(self._rows(next(piece for maker in self.makers for piece in filter_slices(maker))))
            * self.sign[:, None]
        )
        mean = directions(self._sum(unit * self.share[:, None]))[self.labels]
        own = self._sum(share * gamma)[self.labels], self._sum(share * beta)[self.labels]
        return regression(gamma, beta, *own, (unit * mean).sum(dim=1), otherwise)

    def _mean(self, scale: Tensor) -> Tensor:
        """Mean over each cluster's members with a scale, shape `(count,)`."""
        return self._sum(scale) / self._sum((scale > 0).double()).clamp(min=1)

    def _joint(self, pieces: Sequence[Slice]) -> Tensor:
        """Length of the units' entries in several slices together; 1 where there are none."""
        rows = [self._rows(piece) for piece in pieces]
        return torch.cat(rows, dim=1).norm(dim=1) if rows else torch.ones_like(self.sign)

    def _rows(self, piece: Slice) -> Tensor:
        """Entries of all units in a slice, shape `(size, d)` in float64; narrower units are padded with zeros."""
        found = [(part.units, rows_of(piece, part.units, self.tensors)) for part in parts(self.group)]
        width = max(rows.shape[1] for _, rows in found)
        result = torch.zeros(self.group.size, max(width, 1), dtype=torch.float64)
        for units, rows in found:
            result[torch.tensor(units), : rows.shape[1]] = rows.double().cpu()
        return result

    def _sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.labels, values)

    def _nearest(self) -> Tensor:
        """1 for the member of each cluster nearest to its mean direction (the first of equals), else 0."""
        rows = [directions(self._rows(piece)) for maker in self.makers for piece in filter_slices(maker)]
        if not rows:
            rows = [torch.ones(self.group.size, 1, dtype=torch.float64)]
        unit = torch.cat(rows, dim=1)
        fit = (unit * self._sum(unit)[self.labels]).sum(dim=1)
        best = torch.full((self.count,), -torch.inf, dtype=torch.float64).scatter_reduce(0, self.labels, fit, "amax")
        near = (fit >= best[self.labels] - 1e-9).nonzero().squeeze(1)
        first = torch.full((self.count,), len(fit)).scatter_reduce(0, self.labels[near], near, "amin")
        return torch.zeros(len(fit), dtype=torch.float64).index_fill(0, first, 1)

    def _reference(self, values: Tensor) -> Tensor:
        """For every unit the value of its cluster's nearest member."""
        return self._sum(values * self.nearest)[self.labels]

    def _listed(self, values: Tensor) -> tuple[float, ...]:
        """As plain numbers; units on their own are exactly themselves."""
        return tuple(values.where(~self.alone, 1).tolist())


def _assignment(group: ChannelGroup, labels: Sequence[int] | Tensor) -> Tensor:
    """Labels renumbered by first member, after checking that no cluster mixes what can't be folded."""
    given = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if given.shape != (group.size,):
        raise PlanError(f"group {group.name!r}: {len(given)} labels for {group.size} units")
    number: dict[int, int] = {}
    home: dict[int, tuple[int, int]] = {}
    for unit, label in enumerate(given.tolist()):
        number.setdefault(label, len(number))
        key = (group.blocks[unit], group.classes[unit])
        if home.setdefault(label, key) != key:
            raise PlanError(f"group {group.name!r}: cluster {label} mixes units of different classes or blocks")
    return torch.tensor([number[label] for label in given.tolist()])


def from_clusters(groups: Iterable[ChannelGroup], labels: Mapping[str, Sequence[int]]) -> Plan:
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
    groups = tuple(groups)
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
        members: dict[int, list[int]] = {}
        for unit, label in enumerate(values):
            if int(label) != DROPPED:
                members.setdefault(int(label), []).append(unit)
        _check_clusters(group, members)
        index = {label: new for new, label in enumerate(members)}
        assignment = tuple(index.get(int(label), DROPPED) for label in values)
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
