"""Colours, marks, axes and files that all plots share."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...utils.io import write_atomically, write_text
from .. import stats
from .study import Study


@dataclass(frozen=True, slots=True)
class Colour:
    """A CSS variable's name, and its values in the light and in the dark theme."""

    name: str
    light: str
    dark: str


INK = Colour("ink", "#1c2027", "#e8e6e1")
MUTED = Colour("muted", "#5b626d", "#a4a9b2")
LINE = Colour("line", "#dedad1", "#343941")
PAPER = Colour("card", "#fffefc", "#1b1e23")
BAND = Colour("band", "#e7efe6", "#223029")
CONTROL = Colour("control", "#3d434d", "#c9ccd1")

# Contrast with the paper is at least 3:1 in both themes (WCAG 2.2, 1.4.11). Within METHODS, any two are at least .098
# apart in Oklab as seen with protanopia or deuteranopia (simulated after Machado et al. 2009).
METHODS = (
    Colour("blue", "#185eb8", "#6f8cf5"),
    Colour("ochre", "#c37917", "#f0a24a"),
    Colour("green", "#2b6b08", "#a6e3b4"),
    Colour("plum", "#6d2a5f", "#c46aa3"),
    Colour("olive", "#4a3a05", "#f3d34a"),
    Colour("rose", "#b8527a", "#e58a9c"),
    Colour("cyan", "#1994ba", "#35c3e6"),
)
COOL = (
    Colour("cool-1", "#2a9a98", "#a5efe6"),
    Colour("cool-2", "#1c869a", "#78d3e0"),
    Colour("cool-3", "#166f96", "#58b2e2"),
    Colour("cool-4", "#1e588e", "#5896e0"),
    Colour("cool-5", "#2a4184", "#6a80d9"),
    Colour("cool-6", "#2c2a72", "#7d6fd0"),
)
WARM = (
    Colour("warm-1", "#c9703a", "#fbd09c"),
    Colour("warm-2", "#bd5a3c", "#f6b285"),
    Colour("warm-3", "#ad4545", "#f0927c"),
    Colour("warm-4", "#983353", "#e2767f"),
    Colour("warm-5", "#7d2560", "#cb6392"),
    Colour("warm-6", "#5d1b66", "#b05aa8"),
)
COLOURS = (INK, MUTED, LINE, PAPER, BAND, CONTROL, *METHODS, *COOL, *WARM)

MARKS = {"D": "◆", "^": "▲", "v": "▼", "P": "✚", "<": "◄", ">": "►"}
"""Matplotlib's markers for methods, and the same as text; seven colours and six marks make 42 different pairs."""

SERIES_MARKS = {"o": "●", "p": "⬟", "h": "⬢"}


@dataclass(frozen=True, slots=True)
class Style:
    """How a group is drawn: its colour, Matplotlib's name of its marker, and the mark as text."""

    colour: Colour
    marker: str
    mark: str


def method_style(index: int) -> Style:
    """The style of the method with this number."""
    marker = list(MARKS)[index % len(MARKS)]
    return Style(METHODS[index % len(METHODS)], marker, MARKS[marker])


def step_colour(step: int, steps: int, ramp: Sequence[Colour] = COOL) -> Colour:
    """A colour from pale (the first step) to deep (the last); neighbours share one where steps are many."""
    if steps > len(ramp):
        return ramp[step * len(ramp) // steps]
    return ramp[round(step / max(steps - 1, 1) * (len(ramp) - 1))]


def group_styles(study: Study) -> dict[str, Style]:
    """Label → style. Groups of one method with rising numbers of clusters go from pale to deep."""
    series = {}
    for number, (_, groups) in enumerate(study.series()):
        ramp = (COOL, WARM)[number % 2]
        for step, group in enumerate(groups):
            marker = list(SERIES_MARKS)[(number // 2 + (step if len(groups) > len(ramp) else 0)) % len(SERIES_MARKS)]
            series[group.label] = Style(step_colour(step, len(groups), ramp), marker, SERIES_MARKS[marker])
    found: dict[str, Style] = {}
    for group in study.groups:
        if group.label == study.control:
            found[group.label] = Style(CONTROL, "s", "■")
        else:
            plain = len(found.keys() - series.keys() - {study.control})
            found[group.label] = series.get(group.label) or method_style(plain)
    return found


def css(theme: Literal["light", "dark"]) -> str:
    """The declarations of all colours for a theme."""
    return " ".join(f"--{colour.name}: {getattr(colour, theme)};" for colour in COLOURS)


WIDTH = 4.35
"""Inches: 313 SVG units, a little less than the width of a phone's screen in CSS pixels."""

DASHED = (0, (3, 2))

MATPLOTLIB: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
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
    "lines.linewidth": 1.6,
}
"""Settings under which the plots are drawn."""


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

    def write(self, folder: Path, prefix: str = "") -> list[Path]:
        """Write SVG and PNG to a folder, called after the plot. Returns both paths."""
        svg, png = (folder / f"{prefix}{self.name}.{kind}" for kind in ("svg", "png"))
        write_text(svg, self.file())
        write_atomically(png, lambda temporary: temporary.write_bytes(self.png))
        return [svg, png]

    def inline(self, prefix: str = "") -> str:
        """The figure as SVG markup for the page: transparent, in the page's colours and fonts."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        for colour in COLOURS:
            text = text.replace(colour.light, f"var(--{colour.name})")
        # Several figures live in one document: their ids must not collide.
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}{self.name}-", text)
        head = r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>'
        return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1)


def new_axes(height: float, x: str = "", y: str = "") -> Any:
    """Axes with their labels, in a figure of the common width and of `height` inches, to be `finish`ed."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(WIDTH, height), layout="constrained").add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return axes


def name_rows(axes: Any, labels: Sequence[str]) -> None:
    """One row for each label, from the top."""
    axes.set_yticks(range(len(labels)), [label_text(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=INK.light)


def scale_axis(
    axes: Any, axis: Literal["x", "y"], values: Sequence[float], text: Callable[[float], str], log_from: float
) -> bool:
    """Few ticks; logarithmic where the largest value is `log_from` times the smallest. Returns whether it is."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    ticks, low, high = getattr(axes, f"{axis}axis"), min(values), max(values)
    logarithmic = low > 0 and high > log_from * low
    if logarithmic:
        getattr(axes, f"set_{axis}scale")("log")
        steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 12 * low else (1.0, 2.0, 3.0, 5.0)
        ticks.set_major_locator(LogLocator(subs=steps))
        ticks.set_minor_formatter(NullFormatter())
    else:
        ticks.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ticks.set_major_formatter(lambda number, _: text(number))
    return logarithmic


def finish(name: str, title: str, caption: str, axes: Any) -> Plot:
    """Add a legend of what has a label, and draw the figure once as SVG and once as PNG.

    No date and a fixed salt: equal records give equal bytes.
    """
    import matplotlib

    figure, svg, png = axes.figure, io.BytesIO(), io.BytesIO()
    _add_legend(figure, axes.get_legend_handles_labels()[1])
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label in a script that the font lacks
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": "Filterfold"})
        figure.set_layout_engine("none")  # laid out by now: no need to do it again
        figure.savefig(png, format="png", dpi=200, facecolor=PAPER.light, metadata={"Software": "Filterfold"})
    return Plot(name, title, caption, svg.getvalue().decode(), png.getvalue())


def _add_legend(figure: Any, labels: Sequence[str]) -> None:
    """A legend below the axes, in as many columns as fit; the figure grows by its rows."""
    if not labels:
        return
    size = 8.5 if len(labels) <= 8 else 7.5
    column = 0.56 * size * max(map(len, labels)) + 3.6 * size  # DejaVu Sans is about .56 em wide; the mark, the gap
    columns = max(1, min(4, len(labels), int(72 * WIDTH // column)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.022 * size * rows)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=size, handlelength=1.6, columnspacing=1.4)


def label_text(text: str) -> str:
    """A label that Matplotlib draws as it is: it hides legend entries that begin with an underscore."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    return f" {text}" if text.startswith("_") else text


def interval_bars(values: Sequence[float]) -> list[list[float]] | None:
    """Distances from the mean to the ends of its 95 % interval; None for a single value or equal ones."""
    found, mean = stats.mean_interval(values), math.fsum(values) / len(values)
    return None if found is None or found[0] == found[1] else [[mean - found[0]], [found[1] - mean]]
