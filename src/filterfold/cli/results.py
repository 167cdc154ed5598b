"""How a comparison is shown: the table on the terminal, what it means in words, and the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .display import prose, table


def show(records: Iterable[Mapping[str, Any]], margin: float, control: str = "dense") -> None:
    """Print one table for each model and data set, what it means, and which trials failed."""
    from ..report.build import verdict
    from ..report.tables import HEADINGS, summary

    records = list(records)
    rows = summary(records, control)
    for study in dict.fromkeys(row.study for row in rows):
        table(
            f"{study or 'Comparison'} (mean ± sd over trials)",
            HEADINGS,
            [row.texts for row in rows if row.study == study],
        )
    for line in verdict(records, margin=margin, control=control):
        prose(line)
    for record in records:
        if record["status"] == "failed":
            prose(f"failed: {record['label']} seed {record['seed']}: {record['reason']}")


def write(records: Iterable[Mapping[str, Any]], folder: Path, margin: float, control: str = "dense") -> Path:
    """Write the HTML page, plots and tables of a run folder."""
    from ..report.build import build

    return build(records, folder, margin=margin, control=control)
