"""What the report reads: tables of trials, grouped by network and method."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RecordError

NAMES: dict[str, tuple[str, ...]] = {
    "method": ("method", "group", "algorithm", "label", "variant", "name", "model"),
    "clusters": ("clusters", "numberclusters", "numberofclusters", "numclusters", "nclusters", "k"),
    "seed": ("seed", "trial", "run", "repeat", "repetition", "replicate"),
    "top1": ("top1", "acc1", "accuracy", "acc", "testaccuracy", "testacc"),
    "top5": ("top5", "acc5"),
    "inference_seconds": ("inference", "latency", "seconds", "time"),
    "train_seconds": ("trainseconds", "trainingseconds", "traintime", "trainingtime", "training"),
    "macs": ("macs", "flops", "flop"),
    "parameters": ("parameters", "params", "numparams"),
}
"""Field of a record → names of columns, letters and digits only. The first that fits wins."""


_WORDS = (
    "percent",
    "percentage",
    "pct",
    "seconds",
    "second",
    "secs",
    "sec",
    "ms",
    "milliseconds",
    "time",
    "accuracy",
    "s",
)


_NUMBERS = ("top1", "top5", "inference_seconds", "train_seconds", "macs", "parameters")


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Read a CSV file (comma, semicolon or tab; a header line) as trial records.

    **Arguments:**

    - `path`: the file; one row a trial.
    - `columns`: field → column name where the names don't say it, for instance `{"top1": "score"}`;
      the fields are the keys of `NAMES`.

    **Returns:** records with what the table has. Accuracies all at or below 1 are taken as fractions,
    columns named in ms as milliseconds.

    **Raises:** `RecordError` naming the file, line and column of what can't be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: can't be read as a UTF-8 table ({error})") from error
    lines = text.splitlines()
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=delimiter)
    header = [cell.strip() for cell in next(reader, [])]
    found = _find_columns(header, columns or {}, path)
    records = [
        _record(_row(cells, header, path, line), found, path, line, delimiter == ";")
        for line, cells in enumerate(reader, 2)
        if any(cell.strip() for cell in cells)
    ]
    if not records:
        raise RecordError(f"{path}: the table has a header and no trial")
    _rescale(records, found)
    return records


def _find_columns(header: Sequence[str], given: Mapping[str, str], path: Path) -> dict[str, str]:
    for field, column in given.items():
        if field not in NAMES:
            raise RecordError(f"{field!r} is no field of a trial; the fields are {', '.join(NAMES)}")
        if column not in header:
            raise RecordError(f"{path}: no column {column!r} for {field}; the columns are {', '.join(header)}")
    found, free = dict(given), [column for column in header if column not in given.values()]
    # Training time before inference time: both may end in "seconds".
    for field in sorted(NAMES, key=lambda name: name == "inference_seconds"):
        match = None if field in found else _match(field, free)
        if match:
            found[field] = match
            free.remove(match)
    if "method" not in found and "clusters" not in found:
        raise RecordError(f"{path}: no column names the method; the columns are {', '.join(header)}")
    if not any(field in found for field in _NUMBERS):
        raise RecordError(f"{path}: no column of accuracy or time found among {', '.join(header)}; name it by columns=")
    return found


def _match(field: str, columns: Sequence[str]) -> str | None:
    for name in NAMES[field]:
        for column in columns:
            words = re.findall(r"[a-z]+|[0-9]+", column.lower())
            if name in ("".join(words), "".join(words[: _significant(words)])):
                return column
    return None


def _significant(words: Sequence[str]) -> int:
    """How many leading words are left when unit words at the end are taken off."""
    count = len(words)
    while count > 1 and words[count - 1] in _WORDS:
        count -= 1
    return count


def _row(cells: Sequence[str], header: Sequence[str], path: Path, line: int) -> dict[str, str]:
    if len(cells) != len(header):
        raise RecordError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns")
    return {column: cell.strip() for column, cell in zip(header, cells, strict=True)}


def _record(row: Mapping[str, str], found: Mapping[str, str], path: Path, line: int, comma: bool) -> dict[str, Any]:
    def number(field: str) -> float | None:
        cell = row[found[field]].removesuffix("%").strip() if field in found else ""
        if cell.lower() in ("", "-", "–", "na", "n/a", "nan", "none", "null"):
            return None
        try:
            return float(cell.replace(",", ".") if comma else cell)
        except ValueError:
            raise RecordError(f"{path}, line {line}, column {found[field]!r}: {cell!r} is no number") from None

    clusters = number("clusters")
    method = row[found["method"]] if "method" in found else "clusters"
    method = method.replace("_", " ") or "unnamed"
    if clusters is not None:
        method = method.removesuffix(f" k={clusters:g}") or method  # labels as our own tables have them
    seed = row[found["seed"]] if "seed" in found else str(line - 1)
    return {
        "format": 1,
        "id": f"line {line}",
        "status": "finished",
        "reason": None,
        "method": method,
        "label": method if clusters is None else f"{method} k={clusters:g}",
        "clusters": None if clusters is None else int(clusters),
        "model": None,
        "data": None,
        "seed": int(seed) if seed.isdecimal() else seed,
        "source": path.name,
        "result": {field: number(field) for field in _NUMBERS},
    }


def _rescale(records: Sequence[dict[str, Any]], found: Mapping[str, str]) -> None:
    for field in _NUMBERS:
        values = [r["result"][field] for r in records if r["result"][field] is not None]
        factor = 1.0
        if field in ("top1", "top5") and values and max(values) <= 1:
            factor = 100.0
        if field.endswith("_seconds") and re.search(
            r"(^|[^a-z])(ms|millis\w*)($|[^a-z])", found.get(field, "").lower()
        ):
            factor = 0.001
        for record in records:
            if factor != 1 and record["result"][field] is not None:
                record["result"][field] *= factor


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

    - `records`: trial records (the schema is that of `filterfold.bench.trials`).
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
