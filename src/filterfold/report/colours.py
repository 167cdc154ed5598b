"""One colour and one marker for each group, the same in every plot, table, and theme.

The page swaps every light colour for a CSS variable, so a plot follows the reader's theme; that is
why each name stands for exactly one light colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
