"""From curves to ratios: one for each stage, with the sensitive layers left whole (Li et al. 2017, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...plan import ChannelGroup
from ...profiling.macs import Cost
from ...pruning.budgets.patterns import check_shares
from ...pruning.budgets.prices import SizePrices
from ...pruning.budgets.ranking import unranked
from ...pruning.budgets.solver import last_that_fits, out_of_reach
from .curves import Layer, Sensitivity


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Ratios to prune by.

    - `ratios`: stage → share of the filters to remove from each of its layers.
    - `pruned`, `skipped`: stage → the groups that are pruned, and those that are too sensitive.
    - `loss`: every pruned layer, pruned alone, lost at most so many points of top-1 in the sweep. Together
      they lose more; retraining wins back most of it.
    - `macs`: share of the network's multiply-accumulates that remains.
    """

    criterion: str
    ratios: Mapping[int, float]
    pruned: Mapping[int, tuple[str, ...]]
    skipped: Mapping[int, tuple[str, ...]]
    loss: float
    macs: float

    @property
    def keep(self) -> dict[str, float]:
        """Group → share of its units that stays, as `filterfold.prune(keep=...)` takes it."""
        return {
            group: round(1 - self.ratios[stage], 9)
            for stage, names in self.pruned.items()
            if self.ratios[stage]
            for group in names
        }


def suggest(
    found: Sensitivity,
    groups: Iterable[ChannelGroup],
    cost: Cost,
    *,
    loss: float | None = None,
    macs: float | None = None,
    criterion: str | None = None,
) -> Suggestion:
    """Derive one ratio for each stage and the layers to skip, as Li et al. read their Figure 2.

    A layer *bears* a ratio if it and all smaller ones cost at most `loss` points when it is pruned alone. Of the ratios
    measured, a stage takes the one that removes the most multiply-accumulates when the layers that bear it are pruned
    and the others skipped.

    **Arguments:**

    - `found`: the curves.
    - `groups`, `cost`: of the same network: `filterfold.trace` and `filterfold.profiling.macs.measure`.
    - `loss`: points of top-1 that pruning a layer alone may cost.
    - `macs`: instead: share of the multiply-accumulates that may remain; the smallest such loss is looked for.
    - `criterion`: whose curves to read; the sweep's first by default.

    **Raises:** `ConfigError` if not exactly one of `loss` and `macs` is given, or for a criterion that was not
    measured; `SelectionError` if the target can't be reached with the layers and ratios of the sweep.
    """
    if (loss is None) == (macs is None):
        raise ConfigError("say what is wanted: a loss in points, or a share of MACs, one of the two")
    name = criterion or found.criteria[0]
    if name not in found.criteria:
        raise ConfigError(f"criterion {name!r} was not measured; there is {', '.join(found.criteria)}")
    by_name = {group.name: group for group in groups}
    missing = [layer.group for layer in found.layers if layer.group not in by_name]
    if missing:
        raise ConfigError(f"{missing[0]} is no channel group of this network: the sweep is of another one")
    reading = _Reading(found, by_name, cost, name)
    if loss is not None:
        if not loss >= 0:
            raise ConfigError(f"a loss of {loss:g} points makes no sense: give 0 or more")
        return reading.at(loss)
    assert macs is not None
    check_shares(macs=macs)
    losses = sorted({max(0.0, lost) for points in reading.lost.values() for lost in points.values()}, reverse=True)
    place = last_that_fits(len(losses), lambda place: reading.at(losses[place]).macs <= macs)
    if place is None:
        raise out_of_reach({"macs": macs}, {"macs": reading.at(losses[0]).macs})
    return reading.at(losses[place])


class _Reading:
    """The curves of one criterion, and what the network costs when its layers lose shares of their filters."""

    def __init__(self, found: Sensitivity, groups: Mapping[str, ChannelGroup], cost: Cost, criterion: str) -> None:
        self.layers, self.ratios, self.criterion, self.whole = found.layers, found.ratios, criterion, cost.macs
        self.prices = SizePrices([unranked(groups[layer.group]) for layer in found.layers], cost)
        self.kept = {layer.group: {p.ratio: p.kept for p in layer.curve(criterion)} for layer in found.layers}
        self.lost: dict[str, dict[float, float]] = {}
        for layer in found.layers:
            worst, self.lost[layer.group] = 0.0, {}
            for point in layer.curve(criterion):  # what a smaller ratio loses, a larger one does not win back
                worst = max(worst, found.base["top1"] - point.top1)
                self.lost[layer.group][point.ratio] = worst

    def at(self, loss: float) -> Suggestion:
        """The suggestion for a loss."""
        ratios: dict[int, float] = {}
        pruned: dict[int, tuple[str, ...]] = {}
        skipped: dict[int, tuple[str, ...]] = {}
        for stage in sorted({layer.stage for layer in self.layers}):
            layers = [layer for layer in self.layers if layer.stage == stage]
            best, least = 0.0, self.whole
            names: tuple[str, ...] = ()
            for ratio in self.ratios:
                bear = tuple(entry.group for entry in layers if self._bears(entry, ratio, loss))
                macs = self._macs(dict.fromkeys(bear, ratio))
                if macs < least:
                    best, names, least = ratio, bear, macs
            ratios[stage], pruned[stage] = best, names
            skipped[stage] = tuple(layer.group for layer in layers if layer.group not in names)
        shares = {name: ratios[stage] for stage, names in pruned.items() for name in names}
        return Suggestion(self.criterion, ratios, pruned, skipped, loss, self._macs(shares) / self.whole)

    def _bears(self, layer: Layer, ratio: float, loss: float) -> bool:
        return self.lost[layer.group].get(ratio, float("inf")) <= loss + 1e-9

    def _macs(self, ratios: Mapping[str, float]) -> int:
        """What remains when the groups lose these shares; which units go makes no difference."""
        counts = [
            self.kept[layer.group][ratios[layer.group]] if layer.group in ratios else layer.size
            for layer in self.layers
        ]
        return self.prices.amounts(counts)["macs"]
