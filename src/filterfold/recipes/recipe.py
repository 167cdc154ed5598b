"""The recipe: plain values that say how a network is trained, pruned, and trained again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """A share of the filters to remove from some layers.

    **Arguments:**

    - `layers`, `skip`: names or glob patterns of layers, and of those among them that stay whole.
    - `ratio`: share of the filters removed; int(C·(1 - ratio)) of C stay.
    """

    layers: tuple[str, ...]
    ratio: float
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse ratios out of range and rules about nothing."""
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio:g}: the share of filters to remove must lie between 0 and 1")
        if not self.layers:
            raise ConfigError("a [[prune]] entry names no layers")


@dataclass(frozen=True, slots=True)
class Figures:
    """What a publication prints about one network.

    - `error`: percent.
    - `macs`, `weights`: as printed, such as "9.09e7".
    - `macs_removed`, `weights_removed`: percent of the dense network's.
    """

    error: float | None = None
    macs: str | None = None
    weights: str | None = None
    macs_removed: float | None = None
    weights_removed: float | None = None


@dataclass(frozen=True, slots=True)
class PruningRecipe:
    """A network's way from fresh weights to a small one.

    **Arguments:**

    - `name`, `title`: for the command line, and for tables.
    - `model`: for `zoo.build`, with `classes` and `image_size`; `data`: for `data.load`.
    - `rules`: what is removed.
    - `criterion`: which filters go; `follow`: see `filterfold.criteria.score`.
    - `base`: fields of `training.Recipe` for the dense network.
    - `retrain`: name → fields of `training.Recipe` for training after the cut; the first is the default.
    - `scratch`: fields of `training.Recipe` in which the small network's training from fresh weights differs from the
      base's; None: no such twin.
    - `dense`, `pruned`, `scratched`: the publication's figures.
    - `uncounted`: patterns of layers that the publication's counts leave out.
    """

    name: str
    model: str
    data: str
    rules: tuple[Rule, ...]
    title: str = ""
    image_size: int = 32
    classes: int = 10
    criterion: str = "l1"
    follow: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scratch: Mapping[str, Any] | None = None
    dense: Figures = Figures()
    pruned: Figures = Figures()
    scratched: Figures = Figures()
    uncounted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a recipe that removes nothing."""
        if not self.rules:
            raise ConfigError(f"recipe {self.name!r} has no [[prune]] entry, so it removes nothing")

    @property
    def keep(self) -> dict[str, float]:
        """Pattern → share of the units that stays, as `filterfold.select(keep=...)` takes it: the last match counts.

        >>> PruningRecipe("r", "m", "d", (Rule(("a.*",), 0.3, ("a.1",)),)).keep
        {'a.*': 0.7, 'a.1': 1.0}
        """
        shares: dict[str, float] = {}
        for rule in self.rules:
            shares |= dict.fromkeys(rule.layers, round(1 - rule.ratio, 9)) | dict.fromkeys(rule.skip, 1.0)
        return shares

    def schedule(self, name: str | None = None) -> tuple[str, dict[str, Any]]:
        """The retraining of that name, or the first: its name and fields.

        **Raises:** `ConfigError` if there is none of that name.
        """
        chosen = name or next(iter(self.retrain), "")
        if chosen not in self.retrain:
            known = ", ".join(self.retrain) or "none"
            raise ConfigError(f"recipe {self.name!r} has no retraining {chosen!r}; there is {known}")
        return chosen, dict(self.retrain[chosen])
