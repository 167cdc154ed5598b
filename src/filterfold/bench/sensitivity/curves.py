"""What a sensitivity sweep found, and its form as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RecordError
from ...utils.io import write_json

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Point:
    """One layer pruned alone by one criterion.

    - `criterion`, `ratio`: what was removed: this share of the units, those that the criterion values least.
    - `kept`: units left: int(size·(1 - ratio)), at least one.
    - `top1`, `top5`: percent; `loss`: mean cross-entropy in nats. None before the sweep is over.
    """

    criterion: str
    ratio: float
    kept: int
    top1: float
    top5: float
    loss: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One channel group.

    - `group`, `size`: its name, and its number of units.
    - `stage`: layers whose feature maps have the same size are of one stage, counted from 1.
    - `exact`: whether removing a unit equals masking it, which is what was measured.
    - `partial`: whether only the end of the network was run again (False: full passes, where the short
      cut did not give the same outputs).
    - `points`: one for each criterion and ratio.
    """

    group: str
    size: int
    stage: int
    exact: bool
    partial: bool
    points: tuple[Point, ...]

    def curve(self, criterion: str) -> tuple[Point, ...]:
        """The points of one criterion, by rising ratio."""
        return tuple(sorted((p for p in self.points if p.criterion == criterion), key=lambda point: point.ratio))


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The result of a sweep.

    - `base`: the whole network: keys `top1`, `top5` (percent) and `loss`, on the same images.
    - `images`: how many.
    - `layers`: in the order of the network.
    - `seconds`, `cpu_seconds`: how long it took on the clock and on all processors together.
    - `conditions`: what else a reader needs: model, weights, data, versions, …
    """

    base: Mapping[str, float]
    images: int
    layers: tuple[Layer, ...]
    seconds: float
    cpu_seconds: float
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that were asked for."""
        return tuple(dict.fromkeys(point.criterion for layer in self.layers for point in layer.points))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios that were asked for, rising."""
        return tuple(sorted({point.ratio for layer in self.layers for point in layer.points}))

    def mean(self, criterion: str, ratio: float) -> float:
        """Mean top-1 over the layers, each pruned alone by this ratio."""
        found = [p.top1 for layer in self.layers for p in layer.points if (p.criterion, p.ratio) == (criterion, ratio)]
        return sum(found) / len(found)

    def ranked(self, criterion: str, ratio: float) -> list[tuple[str, float]]:
        """(group, top-1) of the layers pruned by this ratio, the most sensitive first."""
        found = [
            (layer.group, point.top1)
            for layer in self.layers
            for point in layer.points
            if (point.criterion, point.ratio) == (criterion, ratio)
        ]
        return sorted(found, key=lambda entry: entry[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, "kind": "sensitivity", **asdict(self)}

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Read what `write` wrote.

        **Raises:** `RecordError` naming the file and what is wrong with it.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document.get("kind") != "sensitivity" or document.get("format") != FORMAT:
                raise RecordError(f"{path}: not a sensitivity sweep of this version")
            layers = tuple(
                Layer(**{**entry, "points": tuple(Point(**point) for point in entry["points"])})
                for entry in document["layers"]
            )
            names = ("base", "images", "seconds", "cpu_seconds", "conditions")
            return cls(layers=layers, **{name: document[name] for name in names})
        except FileNotFoundError:
            raise RecordError(f"{path}: no such file; `filterfold sensitivity --out {path}` makes one") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RecordError(f"{path}: not a whole sensitivity sweep ({error})") from error
