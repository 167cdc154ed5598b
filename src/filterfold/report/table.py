"""The table as such, apart from what stands in it and from how it is shown (terminal, HTML, CSV, Markdown)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from .numbers import MISSING, p_value
from .study import Measure

Plain = str | float | int | None


@dataclass(frozen=True, slots=True)
class Cell:
    """What people read, and the full value that goes into the CSV file."""

    text: str
    value: Plain = None


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table. The first column names the row; `group_column` says that it names groups."""

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
            writer.writerow(
                ["" if cell.text == MISSING else cell.text if cell.value is None else cell.value for cell in row]
            )
        return out.getvalue()

    def markdown(self) -> str:
        """The printed values as a Markdown table, with its title and notes."""
        lines = [f"### {_markdown(self.title)}", ""]
        lines.append("| " + " | ".join(map(_markdown, self.columns)) + " |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(_markdown(cell.text) for cell in row) + " |" for row in self.rows]
        lines += [f"\n{_markdown(note)}" for note in self.notes]
        return "\n".join(lines) + "\n"


def p_cell(p: float | None) -> Cell:
    """A p-value to four places."""
    return Cell(p_value(p), p)


def heading(measure: Measure) -> str:
    """A measure with its unit."""
    return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def _markdown(text: str) -> str:
    for mark in ("\\", "|", "<", ">", "*", "_", "`"):
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return " ".join(text.split())
