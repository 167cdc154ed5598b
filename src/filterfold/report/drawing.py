"""Drawing: figures of one size and style, and their way into files and into the page.

Figures are made with Matplotlib's object interface, so no global state is touched. They are small on
purpose: a figure fills a phone's width with readable text, and two stand side by side on a desk.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import stats
from .colours import BAND, INK, LINE, MUTED, PAPER, Look

WIDTH = 4.35
"""Inches: 313 SVG units, a little less than the width of a phone's screen in CSS pixels."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED.light,
    "axes.edgecolor": LINE.light,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "text.color": INK.light,
    "text.parse_math": False,
    "xtick.color": LINE.light,
    "ytick.color": LINE.light,
    "xtick.labelcolor": MUTED.light,
    "ytick.labelcolor": MUTED.light,
    "axes.grid": True,
    "grid.color": LINE.light,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished figure with its file name, title, and a sentence for those who can't see it.

    `svg` is transparent and in the light theme's colours; `png` (200 dots an inch) lies on paper.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes

    def file(self) -> str:
        """The figure as an SVG file of its own, on the light paper."""
        paper = f'<rect width="100%" height="100%" fill="{PAPER.light}"/>'
        return self.svg.replace("<defs>", f"{paper}<defs>", 1)

    def inline(self, looks: Mapping[str, Look], prefix: str = "") -> str:
        """The figure as SVG markup for the page: transparent, in the page's colours and fonts."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        for colour in (INK, MUTED, LINE, PAPER, BAND, *(look.colour for look in looks.values())):
            text = text.replace(colour.light, f"var(--{colour.name})")
        # Several figures live in one document: their ids must not collide.
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}{self.name}-", text)
        head = r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>'
        return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1)


def finish(name: str, title: str, caption: str, figure: Any) -> Plot:
    """Draw the figure once in each form; no date and a fixed salt, so equal records give equal bytes."""
    import matplotlib

    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label in a script that the font lacks
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": "Filterfold"})
        figure.set_layout_engine("none")  # laid out by now: no need to do it again
        figure.savefig(png, format="png", dpi=200, facecolor=PAPER.light, metadata={"Software": "Filterfold"})
    return Plot(name, title, caption, svg.getvalue().decode(), png.getvalue())


@contextmanager
def new_axes(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of the common width and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    yield figure, figure.add_subplot()


def add_legend(figure: Any, entries: int) -> None:
    """A legend below the axes; the figure grows by its rows."""
    columns = 3 if entries > 4 else 2
    rows = -(-entries // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4)


def label_text(text: str) -> str:
    """A label that Matplotlib draws as it is: it hides legend entries that begin with an underscore."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    return f" {text}" if text.startswith("_") else text


def interval_bars(values: Sequence[float]) -> list[list[float]] | None:
    """Distances from the mean to the ends of its 95 % interval; None for a single value or equal ones."""
    found, mean = stats.mean_interval(values), sum(values) / len(values)
    if found is None or found[0] == found[1]:
        return None
    return [[mean - found[0]], [found[1] - mean]]
