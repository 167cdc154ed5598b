"""Reads a CSV table of trials as records."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
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
"""Field of a record → names of columns, letters and digits only. The first that fits is taken."""

_NUMBERS = ("top1", "top5", "inference_seconds", "train_seconds", "macs", "parameters")
_MOST = 1e20
"""No count and no time is larger."""
_UNIT = re.compile(r"percent(age)?|pct|sec(ond)?s?|ms|milliseconds|time|accuracy|s")
_MISSING = ("", "-", "–", "na", "n/a", "none", "null")


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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: can't be read as a UTF-8 table ({error})") from error
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=delimiter)
    header = [cell.strip() for cell in next(reader, [])]
    found = _find_columns(header, columns or {}, path)
    records = []
    for line, cells in enumerate(reader, 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise RecordError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns")
        row = {field: cells[header.index(column)].strip() for field, column in found.items()}
        records.append(_record(row, found, f"{path}, line {line}", line, decimal_comma=delimiter == ";"))
    if not records:
        raise RecordError(f"{path}: the table has a header and no trial")
    _rescale(records, found)
    return [record | {"source": path.name} for record in records]


def _find_columns(header: Sequence[str], given: Mapping[str, str], path: Path) -> dict[str, str]:
    """Field → column: those given, and those recognised by their names."""
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
    """The first column that has one of the field's names, with or without words for a unit at its end."""
    for name in NAMES[field]:
        for column in columns:
            words = re.findall(r"[a-z]+|[0-9]+", column.lower())
            whole = "".join(words)
            while len(words) > 1 and _UNIT.fullmatch(words[-1]):
                words.pop()
            if name in (whole, "".join(words)):
                return column
    return None


def _record(
    row: Mapping[str, str], columns: Mapping[str, str], place: str, line: int, decimal_comma: bool
) -> dict[str, Any]:
    def number(field: str) -> float | None:
        cell = row.get(field, "").removesuffix("%").strip()
        if cell.lower() in _MISSING:
            return None
        try:
            found = float(cell.replace(",", ".") if decimal_comma else cell)
        except ValueError:
            raise RecordError(f"{place}, column {columns[field]!r}: {cell!r} is no number") from None
        limit = 100 if field in ("top1", "top5") else _MOST
        if not 0 <= found <= limit:
            what = "accuracy from 0 to 100 %" if limit == 100 else f"{field.replace('_', ' ')}"
            raise RecordError(
                f"{place}, column {columns[field]!r}: {cell} is no {what}; leave the cell empty if nothing was measured"
            )
        return found

    clusters, seed = number("clusters"), row.get("seed", str(line - 1))
    method = row.get("method", "clusters").replace("_", " ") or "unnamed"
    if clusters is not None:
        method = method.removesuffix(f" k={clusters:g}") or method  # labels as our own tables have them
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
        "result": {field: number(field) for field in _NUMBERS},
    }


def _rescale(records: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> None:
    """Turn fractions into percent and milliseconds into seconds, in place."""
    for field in _NUMBERS:
        values = [r["result"][field] for r in records if r["result"][field] is not None]
        factor = 1.0
        if field in ("top1", "top5") and values and max(values) <= 1:
            factor = 100.0
        if field.endswith("_seconds") and re.search(
            r"(^|[^a-z])(ms|millis\w*)($|[^a-z])", columns.get(field, "").lower()
        ):
            factor = 0.001
        for record in records if factor != 1 else ():
            if record["result"][field] is not None:
                record["result"][field] *= factor
