"""Li et al.'s Table 1 beside our own trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes import Figures, PruningRecipe
from .format import MISSING, number
from .study import TOP1
from .table import Cell, Table, cell, mean_cell

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
        "dense": (recipe.paper.dense, title.partition("-pruned")[0]),
        "scratch": (recipe.paper.scratch, f"{title} scratch"),
    }
    rows = []
    dense = [one for one in found if one.record["method"] == "dense"]
    for method in ("dense", recipe.criterion, "scratch"):
        ours = [one for one in found if one.record["method"] == method]
        if ours:
            figures, name = printed.get(method, (recipe.paper.pruned, title))
            rows.append(_row(name, ours, dense, figures))
    return Table(recipe.name, f"{title}: ours beside the paper's", COLUMNS, tuple(rows), _notes(recipe, found))


def _row(name: str, ours: Sequence[Measured], dense: Sequence[Measured], paper: Figures) -> tuple[Cell, ...]:
    errors = [100 - one.record["result"]["top1"] for one in ours]
    best = [100 - b for one in ours if (b := one.record["result"]["best_top1"]) is not None]
    macs, weights = ours[0].macs, ours[0].weights
    whole = dense[0] if dense and ours[0] is not dense[0] else None
    return (
        cell(name),
        cell(len(ours)),
        mean_cell(errors, TOP1),
        mean_cell(best, TOP1),
        cell(paper.error, number(paper.error, "percent")),
        cell(macs, f"{macs:,}"),
        _removed(macs, whole.macs if whole else None),
        Cell(_printed(paper.macs, paper.macs_removed)),
        cell(weights, f"{weights:,}"),
        _removed(weights, whole.weights if whole else None),
        Cell(_printed(paper.weights, paper.weights_removed)),
    )


def _removed(after: int, before: int | None) -> Cell:
    if not before:
        return cell(None)
    share = 100 * (1 - after / before)
    return cell(share, f"{share:.1f} %")


def _printed(amount: str | None, removed: float | None) -> str:
    return MISSING if amount is None else amount + ("" if removed is None else f", {removed:.1f} %")


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
    if recipe.paper.uncounted:
        notes.append(f"As in the paper, {', '.join(recipe.paper.uncounted)} are not counted.")
    return tuple(notes)
