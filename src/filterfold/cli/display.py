"""What the terminal shows: progress bars, messages of the library, tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Literal

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..utils.progress import show

console = Console(highlight=False)


if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 140  # tables in files and pipes are not squeezed into Rich's 80 columns


class _Messages(logging.Handler):
    """The library's log as plain lines between the progress bars: warnings, results of trials, what factories got."""

    def __init__(self) -> None:
        super().__init__()
        self._once: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "filterfold.zoo":  # networks are built many times
            if record.getMessage() in self._once:
                return
            self._once.add(record.getMessage())
        elif record.levelno < logging.WARNING and not record.name.startswith("filterfold.bench.trials"):
            return
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(record.getMessage(), style=style, markup=False, soft_wrap=True)


@contextmanager
def live() -> Iterator[None]:
    """Show the library's progress and messages for the length of a `with` block.

    Bars are drawn on a terminal only; messages always.
    """
    logger, handler = logging.getLogger("filterfold"), _Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if not console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars, show(_display(bars)):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _display(bars: Progress) -> Any:
    def draw(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = bars.add_task(description, total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)

    return draw


def table(title: str | None, columns: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> None:
    """Print a table.

    **Arguments:**

    - `texts`: how many columns hold text, to the left; the others hold figures.
    """
    if title is not None:
        console.print(title, style="bold", markup=False)
    console.print(drawn(columns, rows, texts))


def drawn(columns: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> Group:
    """What `table` prints: on a narrow terminal texts wrap, then long names break, then columns go below one another.

    No figure is ever cut off or broken.
    """
    columns, cells = list(columns), [list(row) for row in rows]
    needed = [_needed(name, [row[place] for row in cells], place < texts) for place, name in enumerate(columns)]
    blocks = [list(range(len(columns)))]
    if not _fit(needed):
        needed = [min(width, _NAME) if place < texts else width for place, width in enumerate(needed)]
        blocks = _blocks(needed, texts)
    return Group(*(_picture(columns, cells, needed, texts, block) for block in blocks))


def _needed(name: str, cells: Sequence[str], text: bool) -> int:
    """The least width of a column: headings and texts wrap between words, figures don't."""
    words = name.split() + (" ".join(cells).split() if text else list(cells))
    return max(map(len, words), default=1)


_NAME = 24
"""On a narrow terminal longer names than this are broken."""


def _fit(widths: Sequence[int]) -> bool:
    """Whether the terminal is wide enough for columns that wide: each has a blank on both sides."""
    return sum(widths) + 2 * len(widths) <= console.width


def _blocks(needed: Sequence[int], texts: int) -> list[list[int]]:
    """Columns that stand side by side; each block begins with those that hold text."""
    first = list(range(min(texts, len(needed))))
    blocks = [list(first)]
    for place in range(len(first), len(needed)):
        if len(blocks[-1]) > len(first) and not _fit([needed[i] for i in (*blocks[-1], place)]):
            blocks.append(list(first))
        blocks[-1].append(place)
    return blocks


def _picture(
    columns: Sequence[str], rows: Sequence[Sequence[str]], needed: Sequence[int], texts: int, block: Sequence[int]
) -> Table:
    """Some of the columns, each as wide as it needs, and as it likes where there is room."""
    widths = {place: needed[place] for place in block}
    for place in block:
        likes = max(len(line) for row in (columns, *rows) for line in row[place].splitlines() or [""])
        free = console.width - sum(widths.values()) - 2 * len(block)
        widths[place] += max(0, min(likes - widths[place], free))
    shown = any(columns[place] for place in block)
    picture = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_header=shown)
    for place, width in widths.items():
        justify: Literal["left", "right"] = "left" if place < texts else "right"
        picture.add_column(columns[place], justify=justify, overflow="fold", width=width)
    for row in rows:
        picture.add_row(*(escape(row[place]) for place in block))
    return picture


def say(message: str) -> None:
    """Print one line as it is: paths are neither wrapped nor coloured."""
    console.print(message, markup=False, soft_wrap=True)


def prose(text: str) -> None:
    """Print a sentence: wrapped between words on a terminal, one line elsewhere."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def count(value: float) -> str:
    """A count that people can read.

    >>> count(313_463_808), count(14_987_722), count(912)
    ('313.5 M', '14.99 M', '912')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.0f}"


def change(before: float, after: float) -> str:
    """A change in percent, signed.

    >>> change(200, 50), change(0, 0)
    ('-75.0 %', '')
    """
    return f"{100 * (after - before) / before:+.1f} %" if before else ""
