"""`filterfold watch`: a running comparison, live in another terminal."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Group
from rich.live import Live
from rich.text import Text
from typer import Argument, Option

from .display import console, count, drawn

if TYPE_CHECKING:
    from ..bench.trials.records import TrialStatus


EXAMPLES = """
Examples:

  filterfold watch runs/vgg16-cifar10

  filterfold watch runs/vgg16-cifar10 --once
"""


HEADINGS = ("Trial", "seed", "", "epoch", "loss", "top-1 %", "MACs", "train s")


AROUND = 6
"""Lines of a terminal that are not rows of the table."""


WIDE = 110
"""Columns of a terminal from which notes stand beside the figures; else those of the first trials stand below."""


NOTES = 4
"""Notes that stand below at most."""


def watch(
    run: Annotated[Path, Argument(help="Run folder of compare, demo, train or recipe run.")],
    once: Annotated[bool, Option("--once", help="Show how it stands now, and end.")] = False,
    every: Annotated[float, Option(help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Show how far every trial of a run is.

    It reads the run folder and disturbs nobody. Top-1 is of the validation images while a trial runs, of the test
    images when it is finished. It ends when all trials have; Ctrl-C ends it before.
    """
    from ..bench.trials.records import statuses

    now = statuses(run)
    if once or not console.is_terminal:
        console.print(_picture(now, None))
        return
    with Live(_picture(now, console.height), console=console, auto_refresh=False) as screen:
        while any(one.state not in ("finished", "failed") for one in now):
            time.sleep(every)
            now = statuses(run)
            screen.update(_picture(now, console.height), refresh=True)


def _picture(now: list[TrialStatus], height: int | None) -> Group:
    noted = [one for one in now if one.note and one.state != "finished"]
    beside = console.width >= WIDE
    below = [] if beside else noted[:NOTES]
    shown = now if height is None else now[: max(1, height - AROUND - len(below))]
    totals = Counter(one.state for one in now)
    line = f"{totals['finished']} of {len(now)} trials finished"
    line += "".join(f", {totals[state]} {state}" for state in ("running", "interrupted", "failed") if totals[state])
    if len(shown) < len(now):
        line += f"; {len(now) - len(shown)} more don't fit on the screen"
    rows = [_row(one) + ([one.note] if beside else []) for one in shown]
    notes = [Text(f"{one.label} seed {one.seed}: {one.note}", no_wrap=True, overflow="ellipsis") for one in below]
    return Group(Text(line), drawn((*HEADINGS, "") if beside else HEADINGS, rows), *notes)


def _row(one: TrialStatus) -> list[str]:
    epoch = "" if one.epoch is None else f"{one.phase} {one.epoch}" + (f"/{one.epochs}" if one.epochs else "")
    figures = [
        "" if value is None else form.format(value) for value, form in ((one.loss, "{:.3f}"), (one.top1, "{:.2f}"))
    ]
    macs = "" if one.macs is None else count(one.macs)
    seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
    return [one.label, str(one.seed), one.state, epoch, *figures, macs, seconds]
