"""Records on their way into a report: sorted into groups, with the numbers that can be compared.

A study holds the trials of one model on one data set; trials of different models or data sets are
never compared with each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecordError

Record = Mapping[str, Any]

_CALLS = "batch_"

CONTROLS = ("dense", "original", "baseline", "control", "unpruned", "reference")
"""Names by which a control is recognised when the one asked for is not there."""

_ORDER = (*CONTROLS, "l1", "l2", "random", "scratch")


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that every trial may have: its key, what to call it, its unit, and how to print it."""

    key: str
    title: str
    unit: str
    kind: str = "number"


TOP1 = Measure("top1", "Top-1", "%", "percent")
TOP5 = Measure("top5", "Top-5", "%", "percent")
SECONDS = Measure("inference_seconds", "Inference time", "s", "seconds")
MACS = Measure("macs", "MACs", "", "count")
PARAMETERS = Measure("parameters", "Parameters", "", "count")
TRAIN_SECONDS = Measure("train_seconds", "Training time", "s", "seconds")
TRAIN_IMAGES = Measure("train_images", "Images in training", "", "count")
TRAIN_MACS = Measure("train_macs", "MACs of training", "", "count")

MEASURES = (TOP1, TOP5, SECONDS, MACS, PARAMETERS, TRAIN_SECONDS)
"""What a comparison shows."""

TRAINING = (TRAIN_SECONDS, TRAIN_IMAGES, TRAIN_MACS)
"""What training takes."""

TESTED = (SECONDS, TOP1, TOP5)
"""The measures that the document tests, in its order."""


def value(record: Record, key: str) -> float | None:
    """A finite number of a record, or None where it has none."""
    found = (record.get("result") or {}).get(key)
    if key.startswith(_CALLS):
        rounds = ((record.get("timing") or {}).get("batches") or {}).get(key.removeprefix(_CALLS))
        found = statistics.median(rounds) if rounds else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def calls(size: int) -> Measure:
    """Seconds of one call with so many images."""
    return Measure(f"{_CALLS}{size}", f"Batch {size}", "s", "seconds")


def batch_sizes(study: Study) -> list[int]:
    """The batch sizes at which networks of the study were timed."""
    found = (((trial.get("timing") or {}).get("batches") or {}).keys() for trial in study.trials)
    return sorted({int(size) for sizes in found for size in sizes})


@dataclass(frozen=True, slots=True)
class Group:
    """The finished trials of one method with one setting."""

    label: str
    method: str
    clusters: int | None
    trials: tuple[Record, ...]

    def values(self, measure: Measure) -> list[float]:
        """The measure's values of the trials that have it."""
        found = (value(trial, measure.key) for trial in self.trials)
        return [number for number in found if number is not None]

    @property
    def n(self) -> int:
        """Number of finished trials."""
        return len(self.trials)


@dataclass(frozen=True, slots=True)
class Study:
    """Trials of one model on one data set: finished ones by group, failed ones apart.

    `control` is the label of the group that all others are held against, or None if there is none.
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

    def samples(self, measure: Measure) -> dict[str, list[float]]:
        """Label → values, for the groups that have the measure."""
        found = {group.label: group.values(measure) for group in self.groups}
        return {label: values for label, values in found.items() if values}

    def series(self) -> list[tuple[str, list[Group]]]:
        """Method → its groups by number of clusters, for methods that were run with two numbers or more."""
        methods = dict.fromkeys(group.method for group in self.groups if group.clusters is not None)
        found = [(name, [g for g in self.groups if g.method == name and g.clusters is not None]) for name in methods]
        return [(name, groups) for name, groups in found if len(groups) > 1]


def studies(records: Iterable[Record], control: str = "dense") -> list[Study]:
    """Sort records into studies, one for every pair of model and data set, in order of appearance.

    **Arguments:**

    - `records`: trial records (the schema is that of `filterfold.experiment`).
    - `control`: method or label that the others are held against. If a study has no such group, a
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
    finished = [record for record in records if record.get("status", "finished") == "finished"]
    failed = tuple(record for record in records if record.get("status", "finished") != "finished")
    labels: dict[str, list[Record]] = {}
    for record in finished:
        labels.setdefault(_label(record), []).append(record)
    groups = [
        Group(label, str(trials[0].get("method") or label), trials[0].get("clusters"), tuple(sorted(trials, key=_seed)))
        for label, trials in labels.items()
    ]
    reference = _find_control(groups, control)
    groups.sort(key=lambda group: _rank(group, reference))
    return Study(model, data, tuple(groups), failed, reference)


def _label(record: Record) -> str:
    return str(record.get("label") or record.get("method"))


def _seed(record: Record) -> tuple[int, float, str]:
    seed = record.get("seed")
    return (0, float(seed), "") if isinstance(seed, int | float) else (1, 0.0, str(seed))


def _find_control(groups: Sequence[Group], control: str) -> str | None:
    for name in (control, *CONTROLS):
        for group in groups:
            if name.lower() in (group.label.lower(), group.method.lower()):
                return group.label
    return None


def _rank(group: Group, control: str | None) -> tuple[bool, int, str, float, str]:
    name = group.method.lower()
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER) + name.startswith("online")
    return (group.label != control, place, name, float(group.clusters or 0), group.label)
