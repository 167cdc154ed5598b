"""Trials grouped by network, data set and method, and the measures that a report shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RecordError

Record = Mapping[str, Any]

CONTROLS = ("dense", "original", "baseline", "control", "unpruned", "reference")
"""Names by which a control is recognised when the one asked for is not there."""

_ORDER = (*CONTROLS, "l1", "l2", "random", "scratch")
_CALL = "batch_"


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that every trial may have: its key, what to call it, its unit, and how to print it."""

    key: str
    title: str
    unit: str
    kind: str = "number"

    @property
    def heading(self) -> str:
        """Title and unit, for the head of a column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


TOP1 = Measure("top1", "Top-1", "%", "percent")
TOP5 = Measure("top5", "Top-5", "%", "percent")
SECONDS = Measure("inference_seconds", "Inference time", "s", "seconds")
MACS = Measure("macs", "MACs", "", "count")
PARAMETERS = Measure("parameters", "Parameters", "", "count")
TRAIN_SECONDS = Measure("train_seconds", "Training time", "s", "seconds")
TRAIN_IMAGES = Measure("train_images", "Images in training", "", "count")
TRAIN_MACS = Measure("train_macs", "MACs of training", "", "count")

COMPARED = (TOP1, TOP5, SECONDS, MACS, PARAMETERS, TRAIN_SECONDS)
TRAINING = (TRAIN_SECONDS, TRAIN_IMAGES, TRAIN_MACS)
TESTED = (SECONDS, TOP1, TOP5)
"""The measures that the document tests, in its order."""


def call_seconds(size: int) -> Measure:
    """Seconds of one call with so many images."""
    return Measure(f"{_CALL}{size}", f"Batch {size}", "s", "seconds")


def value(record: Record, measure: Measure) -> float | None:
    """A finite number of a record, or None where it has none."""
    found = (record.get("result") or {}).get(measure.key)
    if measure.key.startswith(_CALL):
        rounds = ((record.get("timing") or {}).get("batches") or {}).get(measure.key.removeprefix(_CALL))
        found = statistics.median(rounds) if rounds else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def widths_of(record: Record) -> dict[str, list[int]]:
    """Layer → its width before and after the cut."""
    return (record.get("result") or {}).get("widths") or {}


@dataclass(frozen=True, slots=True)
class Group:
    """The finished trials of one method with one setting."""

    label: str
    method: str
    clusters: int | None
    trials: tuple[Record, ...]

    def values(self, measure: Measure) -> list[float]:
        """The measure's values of the trials that have it."""
        return [number for trial in self.trials if (number := value(trial, measure)) is not None]

    def pairs(self, x: Measure, y: Measure) -> list[tuple[float, float]]:
        """Two measures of the trials that have both."""
        both = ((value(trial, x), value(trial, y)) for trial in self.trials)
        return [(a, b) for a, b in both if a is not None and b is not None]

    def mean(self, measure: Measure) -> float | None:
        """The measure's mean over the trials that have it."""
        values = self.values(measure)
        return sum(values) / len(values) if values else None

    @property
    def n(self) -> int:
        """Number of finished trials."""
        return len(self.trials)


def ratio_of_means(above: Group | None, below: Group, measure: Measure) -> float | None:
    """Mean of one group over the mean of another, where both have the measure."""
    numerator, denominator = above.mean(measure) if above else None, below.mean(measure)
    return numerator / denominator if numerator is not None and denominator else None


@dataclass(frozen=True, slots=True)
class Study:
    """Trials of one model on one data set: finished ones by group, failed ones apart.

    `control` is the label of the group that all others are compared with, or None if there is none.
    """

    model: str
    data: str
    groups: tuple[Group, ...]
    failed: tuple[Record, ...]
    control: str | None

    @property
    def trials(self) -> list[Record]:
        """All finished trials, in the order of the groups."""
        return [trial for group in self.groups for trial in group.trials]

    @property
    def reference(self) -> Group | None:
        """The control group."""
        return next((group for group in self.groups if group.label == self.control), None)

    @property
    def others(self) -> tuple[Group, ...]:
        """All groups but the control."""
        return tuple(group for group in self.groups if group.label != self.control)

    @property
    def title(self) -> str:
        """Model and data set in words, empty for a table that names neither."""
        return " on ".join(part for part in (self.model, self.data) if part)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes at which networks of the study were timed."""
        return sorted({int(size) for t in self.trials for size in (t.get("timing") or {}).get("batches") or {}})

    def samples(self, measure: Measure) -> dict[str, list[float]]:
        """Label → values, for the groups that have the measure."""
        return {group.label: values for group in self.groups if (values := group.values(measure))}

    def series(self) -> list[tuple[str, list[Group]]]:
        """Method → its groups by number of clusters, for methods that were run with two numbers or more."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            if group.clusters is not None:
                found.setdefault(group.method, []).append(group)
        return [(method, groups) for method, groups in found.items() if len(groups) > 1]


def label_of(record: Record) -> str:
    """What a record's group is called: its label, or else its method."""
    return str(record.get("label") or record.get("method"))


def studies(records: Iterable[Record], control: str = "dense") -> list[Study]:
    """Sort records into studies, one for every pair of model and data set, in order of appearance.

    **Arguments:**

    - `records`: trial records (the schema is that of `filterfold.bench.trials`).
    - `control`: method or label that the others are compared with. If a study has no such group, a
      group by another of the usual names (`CONTROLS`) takes its place.

    **Raises:** `RecordError` if there is no record at all, or one without label and method.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "result": {"top1": 90.0}}
    >>> [study] = studies([record | {"seed": 0}, record | {"seed": 1}])
    >>> study.control, study.groups[0].values(TOP1)
    ('dense', [90.0, 90.0])
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if not record.get("label") and not record.get("method"):
            raise RecordError(f"record {record.get('id', '?')!r} has neither label nor method; it is no trial record")
        found.setdefault((str(record.get("model") or ""), str(record.get("data") or "")), []).append(record)
    if not found:
        raise RecordError("there is no record to report on; run some trials first, or check the folder")
    return [_study(model, data, trials, control) for (model, data), trials in found.items()]


def _study(model: str, data: str, records: Sequence[Record], control: str) -> Study:
    failed = tuple(record for record in records if record.get("status", "finished") != "finished")
    labels: dict[str, list[Record]] = {}
    for record in records:
        if record.get("status", "finished") == "finished":
            labels.setdefault(label_of(record), []).append(record)
    groups = [
        Group(label, str(trials[0].get("method") or label), trials[0].get("clusters"), tuple(sorted(trials, key=_seed)))
        for label, trials in labels.items()
    ]
    reference = _find_control(groups, control)
    groups.sort(key=lambda group: _rank(group, reference))
    return Study(model, data, tuple(groups), failed, reference)


def _seed(record: Record) -> tuple[int, float, str]:
    seed = record.get("seed")
    return (0, float(seed), "") if isinstance(seed, int | float) else (1, 0.0, str(seed))


def _find_control(groups: Sequence[Group], control: str) -> str | None:
    for name in (control, *CONTROLS):
        for group in groups:
            if name.lower() in (group.label.lower(), group.method.lower()):
                return group.label
    return None


def _rank(group: Group, control: str | None) -> tuple[bool, int, str, float, str, float, str]:
    """The control first, then one-shot methods in the usual order, then others, then online ones; short ones first."""
    name = group.method.lower()
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER) + name.startswith("online")
    budget, _, epochs = group.label.partition(" epochs=")
    length = float(epochs) if epochs.isdecimal() else 0.0
    return (group.label != control, place, name, float(group.clusters or 0), budget, length, group.label)
