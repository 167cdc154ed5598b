"""From records, or anybody's table, to a folder with the page, its plots and its tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import ConfigError
from ...utils.io import write_atomically, write_text
from ...utils.progress import track
from . import plots, tables
from .figure import looks
from .page import Chapter, render
from .study import Record, Study, read_table, studies
from .verdict import headline, judge, power_words, sentence
from .warnings import readings

PAGE = "report.html"


_log = logging.getLogger("filterfold.bench.report")


def build(
    records: Iterable[Record],
    folder: Path,
    *,
    margin: float = 0.5,
    control: str = "dense",
    title: str | None = None,
) -> Path:
    """Write the report on `records` to `folder`.

    **Arguments:**

    - `records`: trial records (the schema is that of `filterfold.bench.trials`), finished and failed.
    - `folder`: made if it is not there; gets `report.html`, `plots/` (SVG and PNG) and `tables/` (CSV
      and Markdown). Each file is written atomically, the page last; an older report is replaced.
    - `margin`: the largest loss of top-1, in points, that counts as "no worse"; fixed beforehand.
    - `control`: method or label that all others are held against.
    - `title`: the page's heading; model and data set by default.

    **Returns:** the page's path.

    **Raises:** `RecordError` if there are no records, `ConfigError` for a margin that is not above 0.
    """
    if not margin > 0:
        raise ConfigError(f"margin is {margin}; it must be above 0, in points of top-1 (default 0.5)")
    from ... import __version__

    folder, found = Path(folder), studies(records, control)
    chapters = [_chapter(study, margin) for study in track(found, "Drawing the report", len(found))]
    for chapter, prefix in zip(chapters, _prefixes(found), strict=True):
        for table in tables.every(chapter.study, margin):
            write_text(folder / "tables" / f"{prefix}{table.name}.csv", table.csv())
            write_text(folder / "tables" / f"{prefix}{table.name}.md", table.markdown())
        for plot in chapter.plots:
            write_text(folder / "plots" / f"{prefix}{plot.name}.svg", plot.file())
            _write_bytes(folder / "plots" / f"{prefix}{plot.name}.png", plot.png)
    heading = title or "; ".join(study.title for study in found if study.title) or "Comparison of trials"
    page = folder / PAGE
    write_text(page, render(chapters, heading, __version__))
    _log.info("report on %d studies written to %s", len(found), page)
    return page


def from_table(
    table: Path,
    folder: Path,
    *,
    margin: float = 0.5,
    control: str = "dense",
    columns: Mapping[str, str] | None = None,
) -> Path:
    """Write the report on anybody's CSV table of trials; see `read_table` for what it may look like.

    **Arguments:**

    - `table`: the CSV file, one row a trial.
    - `folder`, `margin`, `control`: as for `build`. Without a group called `control`, one called
      original, baseline or the like takes its place.
    - `columns`: field → column name, where the names don't say what they hold.

    **Returns:** the page's path.

    **Raises:** `RecordError` naming file, line and column of what can't be read.
    """
    table = Path(table)
    return build(read_table(table, columns), folder, margin=margin, control=control, title=table.name)


def verdict(records: Iterable[Record], *, margin: float = 0.5, control: str = "dense") -> list[str]:
    """The verdict in sentences, as the terminal prints it: the headline, each method, what n can show, warnings.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "result": {"top1": 90.0}}
    >>> verdict([record | {"seed": 0}, record | {"seed": 1}])
    ['Only dense has finished trials: there is nothing to compare with it yet.']
    """
    lines = []
    found = studies(records, control)
    for study in found:
        judgements = judge(study, margin)
        lead = f"{study.title}: " if len(found) > 1 else ""
        lines.append(lead + headline(study, judgements))
        lines += [sentence(judgement) for judgement in judgements]
        lines += [words] if (words := power_words(judgements)) else []
        lines += [f"Beware: {reading.title}." for reading in readings(study, judgements) if reading.warning]
    return lines


def _chapter(study: Study, margin: float) -> Chapter:
    colours, judgements = looks(study), judge(study, margin)
    drawn = plots.every(study, colours, judgements)
    return Chapter(study, colours, judgements, readings(study, judgements), drawn, margin)


def _prefixes(found: list[Study]) -> list[str]:
    """File name prefixes that keep several studies apart; none for a single one."""
    if len(found) == 1:
        return [""]
    return [f"{i}-{re.sub(r'[^A-Za-z0-9]+', '-', study.title).strip('-')}-" for i, study in enumerate(found, 1)]


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
