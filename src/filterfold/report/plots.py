"""Plots: every trial is a point, every mean has its interval; one colour and marker a group throughout.

Figures are made with Matplotlib's object interface, so no global state is touched. They are small on
purpose: a figure fills a phone's width with readable text, and two stand side by side on a desk.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import stats
from .colours import BAND, INK, LINE, MUTED, PAPER, Look
from .numbers import number, plain, significant
from .study import MACS, SECONDS, TOP1, TOP5, TRAIN_SECONDS, Group, Measure, Record, Study
from .tables import mean_width
from .verdict import Judgement

WIDTH = 4.35
"""Inches: 313 SVG units, a little less than the width of a phone's screen in CSS pixels."""

_RC: dict[Any, Any] = {
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


def _finish(name: str, title: str, caption: str, figure: Any) -> Plot:
    """Draw the figure once in each form; no date and a fixed salt, so equal records give equal bytes."""
    import matplotlib

    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label in a script that the font lacks
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": "Filterfold"})
        figure.set_layout_engine("none")  # laid out by now: no need to do it again
        figure.savefig(png, format="png", dpi=200, facecolor=PAPER.light, metadata={"Software": "Filterfold"})
    return Plot(name, title, caption, svg.getvalue().decode(), png.getvalue())


def every(study: Study, looks: Mapping[str, Look], judgements: Sequence[Judgement]) -> list[Plot]:
    """All plots that the study has material for, in reading order."""
    import matplotlib

    candidates: list[Callable[[], Plot | None]] = [
        lambda: forest(looks, judgements),
        lambda: scatter(study, looks, MACS, "accuracy_macs", "Accuracy against work", "MACs for one image"),
        lambda: scatter(
            study, looks, SECONDS, "accuracy_time", "Accuracy against inference time", "Inference, seconds"
        ),
        lambda: scatter(
            study, looks, TRAIN_SECONDS, "accuracy_training", "Accuracy against training cost", "Training, seconds"
        ),
        lambda: strip(study, looks, SECONDS),
        lambda: strip(study, looks, TOP1),
        lambda: strip(study, looks, TOP5),
        lambda: curves(study, looks, "validation_top1", "Validation top-1 while training", "Validation top-1, %"),
        lambda: curves(study, looks, "train_loss", "Loss while training", "Training loss"),
        lambda: curves(study, looks, "macs", "Work for one image while training", "MACs"),
        lambda: widths(study, looks),
        lambda: clusters(study, looks, "cosine", "Cluster quality", "Mean cosine to the centroid"),
        lambda: clusters(study, looks, "changed", "Filters that changed cluster", "Filters changed, all layers"),
    ]
    with matplotlib.rc_context(_RC):
        return [plot for make in candidates if (plot := make()) is not None]


def forest(looks: Mapping[str, Look], judgements: Sequence[Judgement]) -> Plot | None:
    """Difference in top-1 from the control with its 90 % interval, against the margin."""
    found = [j for j in judgements if j.top1 and j.tost]
    if not found:
        return None
    margin, control = found[0].margin, found[0].control.label
    with _axes(0.9 + 0.32 * len(found)) as (figure, axes):
        axes.axvspan(-margin, margin, color=BAND.light, zorder=0, linewidth=0)
        axes.axvline(0, color=INK.light, linewidth=0.9, zorder=1)
        for row, j in enumerate(found):
            if j.tost is None:
                continue
            look = looks[j.group.label]
            if j.tost.low is not None:
                axes.plot(
                    [j.tost.low, j.tost.high],
                    [row, row],
                    color=look.colour.light,
                    linewidth=2.6,
                    solid_capstyle="round",
                )
            axes.plot(
                j.tost.difference,
                row,
                look.marker,
                color=look.colour.light,
                markersize=6.5,
                markeredgecolor=PAPER.light,
            )
        axes.set_yticks(range(len(found)), [_label(j.group.label) for j in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK.light)
        axes.set_xlabel(f"Top-1 against {_label(control)}, points")
    caption = (
        f"Mean difference in top-1 from {control}, with the 90 % interval of the equivalence test. "
        f"An interval right of the shaded band’s left edge (−{plain(margin)}) shows “no worse”; one inside the band, "
        "“equivalent”."
    )
    return _finish("difference", f"Top-1 against {control}", caption, figure)


def scatter(study: Study, looks: Mapping[str, Look], cost: Measure, name: str, title: str, axis: str) -> Plot | None:
    """Top-1 against a cost: every trial a point, group means with 95 % intervals."""
    found = [(group, _pairs(group, cost)) for group in study.groups]
    found = [(group, points) for group, points in found if points]
    if len({x for _, points in found for x, _ in points}) < 2:
        return None
    with _axes(3.5) as (figure, axes):
        for group, points in found:
            look, colour = looks[group.label], looks[group.label].colour.light
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, look.marker, color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
            bars = {"xerr": _bars(xs), "yerr": _bars(ys), "elinewidth": 1.1, "color": colour}
            mark = {"fmt": look.marker, "markersize": 7, "markeredgecolor": PAPER.light}
            axes.errorbar(sum(xs) / len(xs), sum(ys) / len(ys), **bars, **mark)
            axes.plot([], [], look.marker, color=colour, markersize=6, markeredgewidth=0, label=_label(group.label))
        _cost_axis(axes, [x for _, points in found for x, _ in points], cost)
        axes.set_xlabel(axis)
        axes.set_ylabel("Top-1, %")
        _legend(figure, len(found))
    return _finish(name, title, "Small marks: trials. Large marks: means, with 95 % intervals.", figure)


def strip(study: Study, looks: Mapping[str, Look], measure: Measure) -> Plot | None:
    """Every trial of one measure, one row a group, with the mean as a line."""
    samples = study.samples(measure)
    if len(samples) < 2:
        return None
    with _axes(0.8 + 0.3 * len(samples)) as (figure, axes):
        for row, (label, values) in enumerate(samples.items()):
            look = looks[label]
            # Spread over the row by order, so that equal values stay visible and no random state is used.
            heights = [row + 0.22 * ((i % 3) - 1) / 1.5 for i in range(len(values))]
            axes.plot(values, heights, look.marker, color=look.colour.light, alpha=0.7, markersize=5, markeredgewidth=0)
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.34, row + 0.34], color=INK.light, linewidth=1.6)
        axes.set_yticks(range(len(samples)), [_label(label) for label in samples])
        axes.set_ylim(len(samples) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK.light)
        axes.set_xlabel(f"{measure.title}, {measure.unit}")
        axes.locator_params(axis="x", nbins=6)
        if measure.kind == "seconds":
            axes.set_xlim(left=0)
    return _finish(f"trials_{measure.key}", f"{measure.title} of every trial", "Marks: trials. Lines: means.", figure)


def curves(study: Study, looks: Mapping[str, Look], key: str, title: str, axis: str) -> Plot | None:
    """A quantity over the epochs: mean of a group as a line, trials as faint ones, cuts as marks."""
    found = [(group, [c for trial in group.trials if len(c := _history(trial, key)) > 1]) for group in study.groups]
    found = [(group, lines) for group, lines in found if lines]
    if not found or (key == "macs" and len({y for _, lines in found for line in lines for _, y in line}) < 2):
        return None
    cuts = False
    with _axes(3.3) as (figure, axes):
        for group, lines in found:
            colour = looks[group.label].colour.light
            style = {"color": colour, "drawstyle": "steps-post" if key == "macs" else "default"}
            for line in lines if len(lines) > 1 else ():
                axes.plot(*zip(*line, strict=True), linewidth=0.6, alpha=0.22, **style)
            mean = _mean_curve(lines)
            axes.plot(list(mean), list(mean.values()), **style, label=_label(group.label))
            moments = [x for x in sorted({x for trial in group.trials for x in cut_epochs(trial)}) if x in mean]
            cuts = cuts or bool(moments)
            axes.plot(
                moments, [mean[x] for x in moments], "v", color=colour, markersize=6.5, markeredgecolor=PAPER.light
            )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(axis)
        axes.margins(x=0.02)
        axes.locator_params(axis="x", integer=True)
        notes = _curve_axis(axes, key, [line for _, lines in found for line in lines])
        _legend(figure, len(found))
    caption = "Lines: means over the trials, which are drawn faintly." + (
        " Triangles: the moments of pruning." if cuts else ""
    )
    return _finish(f"curve_{key}", title, caption + notes, figure)


def _curve_axis(axes: Any, key: str, lines: Sequence[Sequence[tuple[int, float]]]) -> str:
    """Scale the axis to what matters, and say so."""
    values = [y for line in lines for _, y in line]
    if key == "macs":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: number(y, "count"))
    if key == "train_loss" and min(values) > 0 and max(values) > 8 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return " Logarithmic scale."
    if key == "validation_top1":
        # The climb out of guessing would squeeze the part in which the methods differ.
        late = [y for line in lines for _, y in line[len(line) // 4 :]]
        low, high = min(late), max(values)
        if low - min(values) > 0.5 * (high - low):
            axes.set_ylim(bottom=low - 0.08 * (high - low))
            return " The axis leaves out the first epochs."
    return ""


def widths(study: Study, looks: Mapping[str, Look]) -> Plot | None:
    """Share of every layer's filters that is left, layer by layer."""
    layers = list(dict.fromkeys(name for trial in study.trials for name in _widths_of(trial)))
    before = {name: _widths_of(trial)[name][0] for trial in study.trials for name in _widths_of(trial)}
    groups = [g for g in study.groups if any(a != b for t in g.trials for a, b in _widths_of(t).values())]
    if len(layers) < 2 or not groups:
        return None
    with _axes(3.5) as (figure, axes):
        for group in groups:
            look = looks[group.label]
            kept = [
                (i, w / before[name]) for i, name in enumerate(layers) if (w := mean_width(group, name)) is not None
            ]
            axes.plot(
                *zip(*kept, strict=True),
                marker=look.marker,
                markersize=4,
                color=look.colour.light,
                label=_label(group.label),
            )
        step = -(-len(layers) // 16)
        axes.set_xticks(
            range(0, len(layers), step),
            [_label(name) for name in layers[::step]],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
            fontsize=7.5,
        )
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        axes.set_ylabel("Filters left")
        _legend(figure, len(groups))
    return _finish(
        "widths",
        "Width of every layer after the cut",
        "Share of each layer’s filters that is left, mean over trials.",
        figure,
    )


def clusters(study: Study, looks: Mapping[str, Look], key: str, title: str, axis: str) -> Plot | None:
    """A figure of merit of the clusterings over the epochs: over layers and trials the mean, or the sum over layers."""
    found = [(group, _cluster_curve(group, key)) for group in study.groups]
    found = [(group, curve) for group, curve in found if len(curve) > 1]
    if not found:
        return None
    with _axes(3.1) as (figure, axes):
        for group, curve in found:
            look = looks[group.label]
            axes.plot(
                list(curve),
                list(curve.values()),
                marker=look.marker,
                markersize=4,
                color=look.colour.light,
                label=_label(group.label),
            )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(axis)
        axes.locator_params(axis="x", integer=True)
        _legend(figure, len(found))
    return _finish(
        f"clusters_{key}", title, "Mean over layers and trials." if key == "cosine" else "Mean over trials.", figure
    )


@contextmanager
def _axes(height: float) -> Iterator[tuple[Any, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    yield figure, figure.add_subplot()


def _legend(figure: Any, entries: int) -> None:
    """A legend below the axes; the figure grows by its rows."""
    columns = 3 if entries > 4 else 2
    rows = -(-entries // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4)


def _cost_axis(axes: Any, values: Sequence[float], cost: Measure) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
        wide = max(values) > 100 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: _tick(x, cost))


def _tick(x: float, cost: Measure) -> str:
    return (
        number(x, "count") if cost.kind == "count" else significant(x, 3).rstrip("0").rstrip(".") if x % 1 else f"{x:g}"
    )


def _bars(values: Sequence[float]) -> list[list[float]] | None:
    """Distances from the mean to the ends of its 95 % interval, cut off at twice the range of the data."""
    found, mean = stats.mean_interval(values), sum(values) / len(values)
    if found is None or found[0] == found[1]:
        return None
    return [[mean - found[0]], [found[1] - mean]]


def _pairs(group: Group, cost: Measure) -> list[tuple[float, float]]:
    found = []
    for trial in group.trials:
        single = Group(group.label, group.method, group.clusters, (trial,))
        xs, ys = single.values(cost), single.values(TOP1)
        if xs and ys:
            found.append((xs[0], ys[0]))
    return found


def _history(trial: Record, key: str) -> list[tuple[int, float]]:
    """(epoch from 1 through all phases, value) of the epochs that have the value."""
    entries = enumerate(trial.get("history") or (), 1)
    return [(epoch, float(entry[key])) for epoch, entry in entries if isinstance(entry.get(key), int | float)]


def cut_epochs(trial: Record) -> list[int]:
    """Epochs, from 1 through all phases, in which the network became smaller."""
    macs = [entry.get("macs") for entry in trial.get("history") or ()]
    steps = enumerate(itertools.pairwise(macs), 2)
    return [epoch for epoch, (before, after) in steps if before and after and after < before]


def _mean_curve(lines: Sequence[Sequence[tuple[int, float]]]) -> dict[int, float]:
    """Mean at every epoch that all lines have; trials cut short don't bend it."""
    points = [dict(line) for line in lines]
    common = [x for x in points[0] if all(x in line for line in points)]
    return {x: sum(line[x] for line in points) / len(points) for x in common}


def _cluster_curve(group: Group, key: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for trial in group.trials:
        for entry in trial.get("clusters_history") or ():
            if isinstance(entry.get(key), int | float):
                values.setdefault(int(entry["epoch"]), []).append(float(entry[key]))
    mean = key == "cosine"
    return {epoch: sum(found) / (len(found) if mean else group.n) for epoch, found in sorted(values.items())}


def _widths_of(trial: Record) -> dict[str, list[int]]:
    return (trial.get("result") or {}).get("widths") or {}


def _label(text: str) -> str:
    """A label that Matplotlib draws as it is: it hides legend entries that begin with an underscore."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    return f" {text}" if text.startswith("_") else text
