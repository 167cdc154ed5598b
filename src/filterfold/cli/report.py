"""`filterfold report`: statistics and a page from records or any table of trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, RecordError
from .display import live, prose
from .figures import Figures


def figures(records: Iterable[Mapping[str, Any]], margin: float, control: str = "dense", code: int = 0) -> Figures:
    """What a comparison came to."""
    from ..bench.report.summary import summary

    records = list(records)
    found = summary(records, margin=margin, control=control) if records else {}
    return Figures(found, partial(show, records, margin, control) if records else lambda: None, code)


def show(records: Iterable[Mapping[str, Any]], margin: float, control: str = "dense") -> None:
    """Print in about ten lines what a comparison came to; the page has the rest."""
    from ..bench.report import brief

    for line in brief(records, margin=margin, control=control):
        prose(line)


def write(records: Iterable[Mapping[str, Any]], folder: Path, margin: float, control: str = "dense") -> Path:
    """Write the HTML page, plots and tables to a folder; returns the page."""
    from ..bench.report import build

    return build(records, folder, margin=margin, control=control)


EXAMPLES = """
Examples:

  filterfold report runs/compare

  filterfold report --table results.csv --control original

  filterfold report --table results.csv --column top1=score --column seed=run
"""

MARGIN_HELP = "The largest loss of top-1, in points, that counts as 'no worse'; to be fixed beforehand."
CONTROL_HELP = "Method that all others are compared with."


def report(
    folder: Annotated[Path | None, Argument(help="Run folder with records of trials.")] = None,
    table: Annotated[Path | None, Option(help="A CSV table instead, one row a trial.")] = None,
    out: Annotated[Path | None, Option(help="Where to write.", show_default="the run folder; NAME-report")] = None,
    margin: Annotated[float, Option(help=MARGIN_HELP)] = 0.5,
    control: Annotated[str, Option(help=CONTROL_HELP)] = "dense",
    column: Annotated[list[str] | None, Option(help="FIELD=COLUMN where a table's names don't say it.")] = None,
) -> Figures:
    """Write the report on a comparison: tables, tests, plots, one HTML page that opens without a network."""
    if (folder is None) == (table is None):
        raise ConfigError("give a run folder or --table FILE, one of the two")
    if column and table is None:
        raise ConfigError("--column says how to read a --table; records need none")
    with live():
        if table is not None:
            from ..bench.report import read_table

            records, place = read_table(table, _columns(column or [])), out or Path(f"{table.stem}-report")
        else:
            from ..bench.trials.records import read_all

            assert folder is not None
            records, place = list(map(dict, read_all(folder))), out or (folder if folder.is_dir() else folder.parent)
        if place.exists() and (not place.is_dir() or (place != folder and _foreign(place))):
            raise RecordError(f"{place} is not empty and holds no report; give another --out")
        page = write(records, place, margin, control)
    return figures(records, margin, control).adding(report=page)


def _foreign(folder: Path) -> bool:
    return any(folder.iterdir()) and not (folder / "report.html").exists()


def _columns(pairs: list[str]) -> dict[str, str]:
    """Field → column.

    >>> _columns(["top1=score"])
    {'top1': 'score'}
    """
    split = [pair.partition("=") for pair in pairs]
    bad = [pair for pair, (field, _, column) in zip(pairs, split, strict=True) if not (field and column)]
    if bad:
        raise ConfigError(f"--column {bad[0]}: give FIELD=COLUMN, such as top1=score")
    return {field: column for field, _, column in split}
