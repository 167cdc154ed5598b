"""What all trials of a comparison have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import ConfigError
from .start import Start

_LATER = ("shares", "follow", "retrain", "scratch", "weights", "start", "distill")
"""Fields of a setting that came after the first records."""


def without_unused(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a setting, without later fields that are not used."""
    return {name: value for name, value in setting.items() if value or name not in _LATER}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all trials of a comparison have in common.

    **Arguments:**

    - `model`, `width`: name for `zoo.build`, and its width multiplier.
    - `data`, `data_options`: source and keyword arguments for `data.load`.
    - `recipe`: fields of `training.Recipe`, all but the seed, which is the trial's.
    - `retrain_epochs`, `retrain_lr`: training after a one-shot cut, at a constant learning rate. Li et al. 2017, §4:
      .001, 40 epochs on CIFAR-10.
    - `round_to`: kept widths are multiples of this.
    - `online`: options for `OnlineFilterClustering` other than the number of clusters.
    - `shares`: layer or pattern → share of the filters that stays, for methods that cut afterwards and are given none.
    - `follow`: `shortcut`, or None; see `criteria.score`.
    - `retrain`, `scratch`: fields of `training.Recipe` in which retraining, and training the small network from
      scratch, differ from a constant `retrain_lr`, and from `recipe`.
    - `weights`: file with the weights that networks begin with. Without `start`'s `tune` they are those of the dense
      network, which is then not trained.
    - `start`: what else is to be known about them: the other fields of `Start`.
    - `distill`: how methods with `+distill` are taught: `weight` and `temperature` (see `ff.Distillation`), `teacher`,
      a file with a network's weights, and their `fingerprint`.
    """

    model: str
    data: str
    width: float = 1.0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    retrain_epochs: int = 40
    retrain_lr: float = 0.001
    round_to: int = 1
    online: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    follow: str | None = None
    retrain: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name, value, good in (
            ("width", self.width, self.width > 0),
            ("retrain_epochs", self.retrain_epochs, self.retrain_epochs >= 0),
            ("retrain_lr", self.retrain_lr, self.retrain_lr > 0),
            ("round_to", self.round_to, self.round_to >= 1),
        ):
            if not good:
                raise ConfigError(f"{name} = {value:g} makes no sense here")
        try:
            self.begins  # noqa: B018  # refuses what makes no sense
        except TypeError as error:
            raise ConfigError(f"start has an entry that this version does not know: {error}") from error

    @property
    def begins(self) -> Start:
        """What networks begin with."""
        return Start(self.weights, **self.start)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; fields that came later only where they are used, so that names of trials stay as they were."""
        return without_unused(asdict(self))
