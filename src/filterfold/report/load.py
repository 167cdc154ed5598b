"""Anybody's table of trials as records: columns are recognised by their names, or given."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecordError

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
