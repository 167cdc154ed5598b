"""Colours, axes and styles that all plots share."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


CONTROL_HUES = ("#3d434d", "#c9ccd1")


# Hues far from the online series' teal to indigo, and from each other; contrast with the paper is at
# least 3:1 in both themes (WCAG 2.2, 1.4.11).
_METHODS = (
    ("#b4531a", "#f0975c"),
    ("#7d7a1f", "#c9c452"),
    ("#9a3f7c", "#e38fc6"),
    ("#a8323a", "#f2868b"),
    ("#4f7a2c", "#9ccb74"),
    ("#6a5a4a", "#c4b19c"),
)


_MARKERS = ("D", "X", "^", "v", "P", "*")


@dataclass(frozen=True, slots=True)
class Look:
    """How a group is drawn: its colour, and Matplotlib's name of its marker."""

    colour: Colour
    marker: str


def looks(study: Study) -> dict[str, Look]:
    """Label → look. Groups of one method with rising numbers of clusters get one hue from pale to deep."""
    found: dict[str, Look] = {}
    series = {group.label: (name, i, len(groups)) for name, groups in study.series() for i, group in enumerate(groups)}
    first = next(iter(study.series()), ("", []))[0]
    plain = 0
    for index, group in enumerate(study.groups):
        name = f"g{index}"
        if group.label == study.control:
            found[group.label] = Look(Colour(name, *CONTROL_HUES), "s")
        elif group.label in series:
            method, step, steps = series[group.label]
            hue = (196.0, 268.0) if method == first else (20.0, 350.0)
            found[group.label] = Look(_sequential(name, step / (steps - 1), hue), "o" if method == first else "h")
        elif group.method.startswith("online") and not any(look.marker == "o" for look in found.values()):
            found[group.label] = Look(_sequential(name, 0.45, (196.0, 268.0)), "o")
        else:
            light, dark = _METHODS[plain % len(_METHODS)]
            round_ = plain // len(_METHODS)
            found[group.label] = Look(Colour(name, _shift(light, round_), dark), _MARKERS[plain % len(_MARKERS)])
            plain += 1
    return found


def variables(colours: Mapping[str, Look], theme: str) -> str:
    """The CSS declarations of all groups' colours for `theme` "light" or "dark"."""
    return " ".join(f"--{look.colour.name}: {getattr(look.colour, theme)};" for look in colours.values())


def _sequential(name: str, place: float, hues: tuple[float, float]) -> Colour:
    hue = hues[0] + (hues[1] - hues[0]) * place
    return Colour(name, oklch(0.64 - 0.28 * place, 0.115, hue), oklch(0.86 - 0.24 * place, 0.10, hue))


def _shift(colour: str, steps: int) -> str:
    """The same colour to the eye, but another string: two groups never share a variable."""
    return f"#{(int(colour[1:], 16) + steps) & 0xFFFFFF:06x}"


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """An OKLCH colour (Ottosson 2020) as sRGB hex, clipped to the gamut.

    >>> oklch(1.0, 0.0, 0.0), oklch(0.0, 0.0, 0.0)
    ('#ffffff', '#000000')
    """
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(max(x, 0.0), 1.0))):02x}" for x in linear)


def _gamma(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055


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
