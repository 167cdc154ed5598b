"""A table as rows of cells, written as CSV and Markdown; the page's template writes it as HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...utils.io import write_text
from .. import stats
from .format import MISSING, mean_sd, p_value
from .study import Measure


@dataclass(frozen=True, slots=True)
class Cell:
    """What people read, and the full value that goes into the CSV file."""

    text: str
    value: str | float | None = None


def cell(value: str | float | None, text: str | None = None) -> Cell:
    """A value with its text; by default the value as it is, or a dash for None.

    >>> cell(5), cell(None), cell(0.123456, "0.12")
    (Cell(text='5', value=5), Cell(text='–', value=None), Cell(text='0.12', value=0.123456))
    """
    return Cell((MISSING if value is None else str(value)) if text is None else text, value)


def mean_cell(values: Sequence[float], measure: Measure) -> Cell:
    """Mean ± standard deviation."""
    return Cell(mean_sd(values, measure), stats.summarise(values).mean if values else None)


def p_cell(p: float | None) -> Cell:
    """A p-value to four places."""
    return Cell(p_value(p), p)


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table. The first column names the row; `group_column` says that it names groups of trials."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    group_column: bool = False

    def csv(self) -> str:
        """The full values as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([_plain(one) for one in row])
        return out.getvalue()

    def markdown(self) -> str:
        """The printed values as a Markdown table, with its title and notes."""
        lines = [f"### {_escape(self.title)}", "", _line(self.columns), "|---|" + "---:|" * (len(self.columns) - 1)]
        lines += [_line(one.text for one in row) for row in self.rows]
        return "\n".join([*lines, *(f"\n{_escape(note)}" for note in self.notes)]) + "\n"

    def write(self, folder: Path, prefix: str = "") -> list[Path]:
        """Write CSV and Markdown to a folder, called after the table. Returns both paths."""
        full, printed = (folder / f"{prefix}{self.name}.{kind}" for kind in ("csv", "md"))
        write_text(full, self.csv())
        write_text(printed, self.markdown())
        return [full, printed]


def _plain(one: Cell) -> str | float:
    return one.value if one.value is not None else "" if one.text == MISSING else one.text


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(map(_escape, texts)) + " |"


def _escape(text: str) -> str:
    marks = {ord(mark): f"\\{mark}" for mark in "\\|*_`"} | {ord("<"): "&lt;", ord(">"): "&gt;"}
    return " ".join(text.translate(marks).split())
