"""From curves to ratios: one for each stage, with the sensitive layers left whole (Li et al. 2017, section 3.3)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import ConfigError, SelectionError
from ...plan import ChannelGroup, Cut, Plan, keep_units
from ...profiling.macs import Cost
from ...pruning.budgets import predict
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
    work = _Work(found, by_name, cost, name)
    if loss is not None:
        if loss < 0:
            raise ConfigError(f"a loss of {loss:g} points makes no sense: give 0 or more")
        return work.at(loss)
    assert macs is not None
    if not 0 < macs < 1:
        raise ConfigError(f"macs={macs:g}: the share that may remain must lie between 0 and 1")
    drops = sorted({max(0.0, drop) for layer in found.layers for drop in work.drops(layer).values()})
    place = bisect_left(drops, -macs, key=lambda drop: -work.at(drop).macs)
    if place == len(drops):
        least = work.at(drops[-1]).macs
        raise SelectionError(f"{macs:.1%} of the MACs can't be reached: the layers measured leave at least {least:.1%}")
    return work.at(drops[place])


@dataclass(frozen=True)
class _Work:
    found: Sensitivity
    groups: Mapping[str, ChannelGroup]
    cost: Cost
    criterion: str

    def drops(self, layer: Layer) -> dict[float, float]:
        """Ratio → points lost, made to rise: what a smaller ratio loses, a larger one does not win back."""
        worst, found = 0.0, {}
        for point in layer.curve(self.criterion):
            worst = max(worst, self.found.base["top1"] - point.top1)
            found[point.ratio] = worst
        return found

    def at(self, loss: float) -> Suggestion:
        """The suggestion for a loss."""
        ratios: dict[int, float] = {}
        pruned: dict[int, tuple[str, ...]] = {}
        skipped: dict[int, tuple[str, ...]] = {}
        for stage in sorted({layer.stage for layer in self.found.layers}):
            layers = [layer for layer in self.found.layers if layer.stage == stage]
            best, most = 0.0, 0
            for ratio in self.found.ratios:
                removed = self.cost.macs - self._macs(dict.fromkeys(self._bear(layers, ratio, loss), ratio))
                if removed > most:
                    best, most = ratio, removed
            names = tuple(self._bear(layers, best, loss)) if best else ()
            ratios[stage], pruned[stage] = best, names
            skipped[stage] = tuple(layer.group for layer in layers if layer.group not in names)
        shares = {name: ratios[stage] for stage, names in pruned.items() for name in names}
        return Suggestion(self.criterion, ratios, pruned, skipped, loss, self._macs(shares) / self.cost.macs)

    def _bear(self, layers: Sequence[Layer], ratio: float, loss: float) -> list[str]:
        return [layer.group for layer in layers if self.drops(layer).get(ratio, float("inf")) <= loss + 1e-9]

    def _macs(self, ratios: Mapping[str, float]) -> int:
        """What remains when the groups lose these shares; which units go makes no difference."""
        cuts = []
        for name, ratio in ratios.items():
            group = self.groups[name]
            kept = next(
                point.kept
                for layer in self.found.layers
                for point in layer.points
                if (layer.group, point.criterion, point.ratio) == (name, self.criterion, ratio)
            )
            cuts.append(Cut(name, keep_units(group.size, range(kept)), group.producers, group.consumers))
        return predict(Plan(tuple(cuts)), self.cost).macs if cuts else self.cost.macs
