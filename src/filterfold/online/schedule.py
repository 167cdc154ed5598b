"""When clusters are updated and cut: fixed epochs, or once the loss no longer falls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens after which epoch. Epochs are counted from 1: epoch e is over when e epochs are done.

    **Arguments:**

    - `updates`: epochs after which `update_clusters()` runs.
    - `milestones`: pairs (epoch, share): after this epoch `cluster_and_prune()` runs, with widths that share of the
      way from full to target; shares rise and end at 1.
    - `patience`: take each milestone as soon as training levels off, when the loss that `step` is told has not become
      better for so many epochs, counted anew from each cut; the milestone's epoch is then the latest. None: on the
      epoch.
    - `change`: share by which a loss must be lower than the best so far to be better.

    ```python
    >>> Schedule.gradual(100).milestones
    ((20, 0.4), (35, 0.8), (50, 1.0))
    >>> Schedule.every(5, 1, 30, milestones=(40,)).updates
    (1, 6, 11, 16, 21, 26)

    ```
    """

    updates: tuple[int, ...] = ()
    milestones: tuple[tuple[int, float], ...] = ()
    patience: int | None = None
    change: float = 0.01

    def __post_init__(self) -> None:
        """Refuse milestones out of order."""
        epochs, shares = [epoch for epoch, _ in self.milestones], [share for _, share in self.milestones]
        if any(epoch < 0 for epoch in (*epochs, *self.updates)):
            raise ConfigError("schedule: epochs are counted from 1")
        if epochs != sorted(set(epochs)) or shares != sorted(set(shares)):
            raise ConfigError(f"schedule: epochs and shares of the milestones must rise, not {self.milestones}")
        if shares and (shares[0] <= 0 or shares[-1] != 1):
            raise ConfigError(f"schedule: shares lie in (0, 1] and the last is 1, not {shares}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"schedule: patience of {self.patience} epochs: at least 1, or None")
        if not 0 <= self.change < 1:
            raise ConfigError(f"schedule: change={self.change}: a share of the loss, in [0, 1)")

    @classmethod
    def every(cls, n: int, start: int, stop: int, *, milestones: tuple[int, ...]) -> Schedule:
        """Update every n epochs from `start` to `stop` (inclusive); milestones take equal steps to the target."""
        if n < 1:
            raise ConfigError(f"schedule: updates every {n} epochs: at least 1")
        steps = tuple((epoch, (index + 1) / len(milestones)) for index, epoch in enumerate(milestones))
        return cls(tuple(range(start, stop + 1, n)), steps)

    @classmethod
    def document(cls, epochs: int) -> Schedule:
        """The form of the original description: clusters watched early and mid, folded once training levels off.

        Updates after every epoch up to the last milestone; three milestones at 50, 60 and 70 % of training. The
        description gives no figures: these leave the last 30 % to the small network.

        >>> Schedule.document(10).milestones
        ((5, 0.333...), (6, 0.666...), (7, 1.0))
        """
        return cls._at(epochs, ((0.5, 1 / 3), (0.6, 2 / 3), (0.7, 1.0)))

    @classmethod
    def gradual(cls, epochs: int) -> Schedule:
        """Milestones at 20, 35 and 50 % of training with 40, 80 and 100 % of the units to be removed gone.

        For half of the units that is 80, 60, 50 % kept: training gets cheap early.
        """
        return cls._at(epochs, ((0.2, 0.4), (0.35, 0.8), (0.5, 1.0)))

    @classmethod
    def early(cls, epochs: int) -> Schedule:
        """Milestones at 5, 10 and 15 % of training, in the steps of `gradual`: nearly all of it is cheap.

        >>> Schedule.early(20).milestones
        ((1, 0.4), (2, 0.8), (3, 1.0))
        """
        return cls._at(epochs, ((0.05, 0.4), (0.1, 0.8), (0.15, 1.0)))

    @classmethod
    def plateau(cls, epochs: int, *, patience: int = 3, change: float = 0.01) -> Schedule:
        """`document`, but each milestone is taken as soon as training levels off.

        >>> Schedule.plateau(100).patience
        3
        """
        return replace(cls.document(epochs), patience=patience, change=change)

    @classmethod
    def of(cls, schedule: str | Schedule | Mapping[str, Any], epochs: int) -> Schedule:
        """A schedule by name ("gradual", "early", "document", "plateau"), as it is, or from its `to_dict()`.

        >>> Schedule.of("document", 10) == Schedule.document(10)
        True
        """
        if isinstance(schedule, Schedule):
            return schedule
        if isinstance(schedule, Mapping):
            return cls.from_dict(schedule)
        if schedule not in ("gradual", "early", "document", "plateau"):
            raise ConfigError(f"schedule={schedule!r}: 'gradual', 'early', 'document', 'plateau', or a Schedule")
        made: Schedule = getattr(cls, schedule)(epochs)
        return made

    @classmethod
    def _at(cls, epochs: int, steps: tuple[tuple[float, float], ...]) -> Schedule:
        """Fractions of training as epochs; steps that fall on one epoch are taken together."""
        if epochs < 1:
            raise ConfigError(f"schedule: {epochs} epochs: at least 1")
        last = max(epochs - 1, 1)  # at least one epoch of training follows the last cut
        found: dict[int, float] = {}
        for fraction, share in steps:
            found[min(max(round(fraction * epochs), 1), last)] = share
        milestones = tuple(sorted(found.items()))
        return cls(tuple(range(1, milestones[-1][0] + 1)), milestones)

    def due(self, epoch: int, passed: int) -> float | None:
        """The share asked for after `epoch` if `passed` milestones are behind, or None."""
        shares = [share for at, share in self.milestones[passed:] if at <= epoch]
        return shares[-1] if shares else None

    def next_share(self, passed: int) -> float:
        """The share of the next milestone, 1 where none is left."""
        return self.milestones[passed][1] if passed < len(self.milestones) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, for JSON."""
        document = {"updates": list(self.updates), "milestones": [list(step) for step in self.milestones]}
        return document if self.patience is None else document | {"patience": self.patience, "change": self.change}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Schedule:
        """What `to_dict` wrote."""
        milestones = tuple((int(at), float(share)) for at, share in document["milestones"])
        patience = {name: document[name] for name in ("patience", "change") if name in document}
        return cls(tuple(document["updates"]), milestones, **patience)


class Plateau:
    """Counts the epochs since a loss last became better.

    **Arguments:**

    - `patience`: after so many epochs without it the loss has levelled off.
    - `change`: what counts as better: lower than the best so far by more than this share of it.

    ```python
    >>> plateau = Plateau(patience=2, change=0.01)
    >>> [plateau.reached(loss) for loss in (1.0, 0.5, 0.499, 0.498, 0.3)]
    [False, False, False, True, False]

    ```
    """

    def __init__(self, patience: int, change: float) -> None:
        self.patience, self.change = patience, change
        self.reset()

    def reset(self) -> None:
        """Begin anew: after a cut the loss is another network's."""
        self.best: float | None = None
        self.waited = 0

    def reached(self, loss: float) -> bool:
        """Note one epoch's loss; NaN is no improvement."""
        if not isnan(loss) and (self.best is None or loss < self.best - self.change * abs(self.best)):
            self.best, self.waited = float(loss), 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Where the count stands."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], int(state["waited"])
