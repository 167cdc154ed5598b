"""Tables as rows of cells, written as Markdown, CSV and HTML; and Li et al.'s table beside ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..recipes import Figures, PruningRecipe
from .format import MISSING, p_value
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


COLUMNS = (
    "Network",
    "n",
    "Test error %, last epoch",
    "Best validation error % (optimistic)",
    "Paper's error % (best on test)",
    "MACs",
    "Removed",
    "Paper's",
    "Weights",
    "Removed",
    "Paper's",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished trial: its record, and its counts as the paper counts."""

    record: Mapping[str, Any]
    macs: int
    weights: int


def paper_table(recipe: PruningRecipe, found: Sequence[Measured]) -> Table:
    """Table 1's rows for one recipe: dense, pruned, from scratch; ours with mean and standard deviation over seeds.

    **Arguments:** `found`: finished trials of the recipe, in any order.

    **Returns:** a table with one row for each method that has a trial.
    """
    title = recipe.title or recipe.name
    printed = {
        "dense": (recipe.dense, title.partition("-pruned")[0]),
        "scratch": (recipe.scratched, f"{title} scratch"),
    }
    rows = []
    dense = [one for one in found if one.record["method"] == "dense"]
    for method in ("dense", recipe.criterion, "scratch"):
        ours = [one for one in found if one.record["method"] == method]
        if ours:
            figures, name = printed.get(method, (recipe.pruned, title))
            rows.append(_row(name, ours, dense, figures))
    return Table(recipe.name, f"{title}: ours beside the paper's", COLUMNS, tuple(rows), _notes(recipe, found))


def _row(name: str, ours: Sequence[Measured], dense: Sequence[Measured], paper: Figures) -> tuple[Cell, ...]:
    errors = [100 - one.record["result"]["top1"] for one in ours]
    best = [100 - b for one in ours if (b := one.record["result"]["best_top1"]) is not None]
    macs, weights = ours[0].macs, ours[0].weights
    whole = dense[0] if dense else None
    return (
        Cell(name),
        Cell(str(len(ours)), len(ours)),
        _errors(errors),
        _errors(best),
        Cell("–" if paper.error is None else f"{paper.error:.2f}", paper.error),
        Cell(f"{macs:,}", macs),
        _removed(macs, whole.macs if whole and ours[0] is not whole else None),
        Cell(_printed(paper.macs, paper.macs_removed)),
        Cell(f"{weights:,}", weights),
        _removed(weights, whole.weights if whole and ours[0] is not whole else None),
        Cell(_printed(paper.weights, paper.weights_removed)),
    )


def _errors(values: Sequence[float]) -> Cell:
    if not values:
        return Cell("–")
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return Cell(f"{fmean(values):.2f}{spread}", fmean(values))


def _removed(after: int, before: int | None) -> Cell:
    if not before:
        return Cell("–")
    share = 100 * (1 - after / before)
    return Cell(f"{share:.1f} %", share)


def _printed(amount: str | None, removed: float | None) -> str:
    return "–" if amount is None else amount + ("" if removed is None else f", {removed:.1f} %")


def _notes(recipe: PruningRecipe, found: Sequence[Measured]) -> tuple[str, ...]:
    """The conditions: what a reader must know to compare."""
    if not found:
        return ()
    record = found[0].record
    options, environment = record["options"], record["environment"]
    base = "weights from a file" if options.get("weights") else f"{options['recipe'].get('epochs')} epochs"
    again = {"schedule": "constant", "lr": options["retrain_lr"], **options.get("retrain", {})}
    notes = [
        f"Data: {record['data']} {options['data_options']}; width {options['width']:g}; base: {base}; "
        f"retraining: {options['retrain_epochs']} epochs, {again['schedule']} from {again['lr']}.",
        f"Seeds {', '.join(str(seed) for seed in sorted({one.record['seed'] for one in found}))}; filterfold "
        f"{environment.get('filterfold')}, torch {environment.get('torch')}, commit {environment.get('commit')}, "
        f"{environment.get('processor')}, {environment.get('device')}, {environment.get('threads')} threads.",
        "Our errors are those of the last epoch on test images that nothing was selected on; the paper's are the best "
        "on test during retraining.",
    ]
    if options.get("weights"):
        notes.append(
            "The dense network's weights came from a file: they may have been trained on the images that are held out "
            "for validation here, so the validation error says little."
        )
    if recipe.uncounted:
        notes.append(f"As in the paper, {', '.join(recipe.uncounted)} are not counted.")
    return tuple(notes)
