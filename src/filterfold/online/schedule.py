"""When clusters are updated and cut: after fixed epochs or optimizer steps, or once the loss no longer falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any, Literal

from ..errors import ConfigError, one_line
from ..utils.arguments import check_fields, typed

DOCUMENT = ((0.5, 1 / 3), (0.6, 2 / 3), (0.7, 1.0))
GRADUAL = ((0.2, 0.4), (0.35, 0.8), (0.5, 1.0))
EARLY = ((0.05, 0.4), (0.1, 0.8), (0.15, 1.0))
"""Milestones of the schedules of these names: (fraction of training, share of the way to the target)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens when. Epochs, or optimizer steps, are counted from 1: epoch e is over when e epochs are done.

    **Arguments:**

    - `updates`: epochs (or steps) after which `update_clusters()` runs.
    - `milestones`: pairs (epoch or step, share): after it `cluster_and_prune()` runs, with widths that share of the
      way from full to target; shares rise and end at 1.
    - `patience`: take each milestone as soon as training levels off, when the loss that `step` is told has not become
      better for so many epochs, counted anew from each cut; the milestone's epoch is then the latest. None: on the
      epoch.
    - `change`: share by which a loss must be lower than the best so far to be better.
    - `unit`: "epoch" or "step": what is counted, and so after what `OnlineFilterClustering.step` is called.

    The class methods take the length of training, `epochs` or `steps`, and place milestones at fractions of it.
    Clusters are updated `every` so many epochs (1) or steps (a hundredth of training) until the last milestone.

    ```python
    >>> Schedule.gradual(100).milestones
    ((20, 0.4), (35, 0.8), (50, 1.0))
    >>> Schedule.gradual(steps=5000, every=500).updates
    (500, 1000, 1500, 2000, 2500)
    >>> Schedule.every(5, 1, 30, milestones=(40,)).updates
    (1, 6, 11, 16, 21, 26)

    ```
    """

    updates: tuple[int, ...] = ()
    milestones: tuple[tuple[int, float], ...] = ()
    patience: int | None = None
    change: float = 0.01
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        """Refuse milestones out of order."""
        check_fields(self)
        places, shares = [place for place, _ in self.milestones], [share for _, share in self.milestones]
        if self.unit not in ("epoch", "step"):
            raise ConfigError(f"schedule: unit={self.unit!r} must be 'epoch' or 'step'")
        if any(place < 0 for place in (*places, *self.updates)):
            raise ConfigError(f"schedule: {self.unit}s are counted from 1")
        if places != sorted(set(places)) or shares != sorted(set(shares)):
            raise ConfigError(f"schedule: {self.unit}s and shares of the milestones must rise, not {self.milestones}")
        if shares and not (shares[0] > 0 and shares[-1] == 1):
            raise ConfigError(f"schedule: shares lie in (0, 1] and the last is 1, not {shares}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"schedule: patience of {self.patience} {self.unit}s: at least 1, or None")
        if not 0 <= self.change < 1:
            raise ConfigError(f"schedule: change={self.change}: a share of the loss, in [0, 1)")

    @classmethod
    @typed
    def every(cls, n: int, start: int, stop: int, *, milestones: tuple[int, ...]) -> Schedule:
        """Update every n epochs from `start` to `stop` (inclusive); milestones take equal steps to the target."""
        if n < 1 or stop < start:
            raise ConfigError(f"schedule: updates every {n} epochs from {start} to {stop}: none")
        steps = tuple((epoch, (index + 1) / len(milestones)) for index, epoch in enumerate(milestones))
        return cls(tuple(range(start, stop + 1, n)), steps)

    @classmethod
    @typed
    def at_fractions(
        cls,
        milestones: Sequence[tuple[float, float]],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        every: int | None = None,
    ) -> Schedule:
        """Milestones given as (fraction of training, share); those that fall on one epoch or step are taken together.

        At least one epoch or step of training follows the last one.

        >>> Schedule.at_fractions([(0.25, 0.5), (0.5, 1.0)], steps=1000).milestones
        ((250, 0.5), (500, 1.0))
        """
        unit, length = _length(epochs, steps)
        if not milestones:
            raise ConfigError("schedule: no milestone, so nothing would ever be cut")
        if any(not 0 <= fraction < 1 for fraction, _ in milestones):
            raise ConfigError("schedule: milestones lie at fractions of training in [0, 1)")
        found: dict[int, float] = {}
        for fraction, share in milestones:
            found[min(max(round(fraction * length), 1), max(length - 1, 1))] = share
        every = _spacing(every, 1 if unit == "epoch" else max(1, length // 100))
        last = max(found, default=0)
        return cls(tuple(range(every, last + 1, every)), tuple(sorted(found.items())), unit=unit)

    @classmethod
    @typed
    def small_cuts(
        cls,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        every: int = 1,
        start: float = 0.0,
        end: float = 0.5,
        power: float = 3.0,
    ) -> Schedule:
        """Many small cuts instead of few large ones, large at first: 1 - (1 - t)^power of the way is gone at time t.

        Zhu & Gupta, "To prune, or not to prune" (2017, arXiv 1710.01878), equation 1, with power 3; 1: equal cuts.

        **Arguments:**

        - `every`: epochs or steps between two cuts. Clusters are updated once before the first cut, and after each.
        - `start`, `end`: fractions of training between which the cuts lie; what follows is left to recovery.

        >>> Schedule.small_cuts(steps=1000, every=100, end=0.4, power=1).milestones
        ((100, 0.25), (200, 0.5), (300, 0.75), (400, 1.0))
        """
        unit, length = _length(epochs, steps)
        every = _spacing(every, 1)
        first, last = round(start * length), min(round(end * length), length - 1)
        if not (0 <= start < end < 1 and power > 0 and last - first >= every):
            raise ConfigError(
                f"schedule: no cut every {every} {unit}s between {start:g} and {end:g} of {length} {unit}s of training"
            )
        places = range(first + every, last + 1, every)
        shares = (1 - (1 - (place - first) / (places[-1] - first)) ** power for place in places)
        updates = sorted({max(first, 1), *places})
        return cls(tuple(updates), tuple(zip(places, shares, strict=True)), unit=unit)

    @classmethod
    @typed
    def document(cls, epochs: int | None = None, *, steps: int | None = None, every: int | None = None) -> Schedule:
        """The form of the original description: clusters watched early and mid, folded once training levels off.

        Three milestones at 50, 60 and 70 % of training. The description gives no figures: these leave the last 30 % to
        the small network.

        >>> Schedule.document(10).milestones
        ((5, 0.333...), (6, 0.666...), (7, 1.0))
        """
        return cls.at_fractions(DOCUMENT, epochs=epochs, steps=steps, every=every)

    @classmethod
    @typed
    def gradual(cls, epochs: int | None = None, *, steps: int | None = None, every: int | None = None) -> Schedule:
        """Milestones at 20, 35 and 50 % of training with 40, 80 and 100 % of the units to be removed gone.

        For half of the units that is 80, 60, 50 % kept: training gets cheap early.
        """
        return cls.at_fractions(GRADUAL, epochs=epochs, steps=steps, every=every)

    @classmethod
    @typed
    def early(cls, epochs: int | None = None, *, steps: int | None = None, every: int | None = None) -> Schedule:
        """Milestones at 5, 10 and 15 % of training, in the steps of `gradual`: nearly all of it is cheap.

        >>> Schedule.early(20).milestones
        ((1, 0.4), (2, 0.8), (3, 1.0))
        """
        return cls.at_fractions(EARLY, epochs=epochs, steps=steps, every=every)

    @classmethod
    @typed
    def plateau(cls, epochs: int, *, patience: int = 3, change: float = 0.01) -> Schedule:
        """`document`, but each milestone is taken as soon as training levels off.

        >>> Schedule.plateau(100).patience
        3
        """
        return replace(cls.document(epochs), patience=patience, change=change)

    @classmethod
    @typed
    def of(cls, schedule: str | Schedule | Mapping[str, Any], epochs: int, steps: int | None = None) -> Schedule:
        """A schedule by name, as it is, or from its `to_dict()`.

        **Arguments:**

        - `schedule`: "gradual", "early", "document", "plateau": by epochs; "small-cuts": twenty of `small_cuts`, by
          steps; "0.1,0.2,0.3": cuts after these fractions of training, by steps, in equal steps to the target.
        - `epochs`, `steps`: the length of training; None: not known, and what counts steps is refused.

        >>> Schedule.of("document", 10) == Schedule.document(10)
        True
        >>> Schedule.of("0.1,0.3", 10, 500).milestones
        ((50, 0.5), (150, 1.0))
        """
        if isinstance(schedule, Schedule):
            return schedule
        if isinstance(schedule, Mapping):
            return cls.from_dict(schedule)
        if schedule in ("gradual", "early", "document", "plateau"):
            made: Schedule = getattr(cls, schedule)(epochs)
            return made
        fractions = _fractions(schedule)
        if schedule != "small-cuts" and not fractions:
            raise ConfigError(
                f"schedule={schedule!r}: 'gradual', 'early', 'document', 'plateau', 'small-cuts', fractions of "
                "training such as '0.1,0.2,0.3', or a Schedule"
            )
        if steps is None:
            raise ConfigError(f"schedule={schedule!r}: the number of optimizer steps is not known here")
        if not fractions:
            return cls.small_cuts(steps=steps, every=max(1, steps // 40))
        return cls.at_fractions([(at, (n + 1) / len(fractions)) for n, at in enumerate(fractions)], steps=steps)

    def passed(self, done: int, before: int) -> int:
        """How many milestones are behind once so many epochs or steps are done, of which `before` were already."""
        return max(before, sum(place <= done for place, _ in self.milestones))

    def next_share(self, passed: int) -> float:
        """The share of the next milestone, 1 where none is left."""
        return self.milestones[passed][1] if passed < len(self.milestones) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, for JSON."""
        document: dict[str, Any] = {"updates": list(self.updates), "milestones": [list(m) for m in self.milestones]}
        if self.patience is not None:
            document |= {"patience": self.patience, "change": self.change}
        return document if self.unit == "epoch" else document | {"unit": self.unit}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Schedule:
        """What `to_dict` wrote."""
        try:
            milestones = tuple((int(at), float(share)) for at, share in document["milestones"])
            others = {name: document[name] for name in ("patience", "change", "unit") if name in document}
            return cls(tuple(document["updates"]), milestones, **others)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"schedule: not what Schedule.to_dict() gives: {one_line(error)}") from error


def _fractions(text: str) -> list[float]:
    """Comma-separated numbers; none where anything else stands there."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _length(epochs: int | None, steps: int | None) -> tuple[Literal["epoch", "step"], int]:
    """What is counted, and how much of it training has."""
    if (epochs is None) == (steps is None):
        raise ConfigError("schedule: say how long training is, in epochs or in steps=")
    unit, length = ("epoch", epochs) if steps is None else ("step", steps)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"schedule: {length} {unit}s: at least 1, a whole number")
    return unit, length  # type: ignore[return-value]  # mypy joins the two words


def _spacing(every: int | None, usual: int) -> int:
    every = usual if every is None else every
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"schedule: every={every}: a whole number of at least 1")
    return every


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
