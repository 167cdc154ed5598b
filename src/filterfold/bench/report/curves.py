"""Plots over epochs and over layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .figure import PAPER, Plot, Style, finish, label_text, new_axes, scale_axis
from .format import tick
from .study import Group, Record, Study
from .tables import cut_groups, mean_width, widths_before

_DASHES = ("-", "--", "-.", ":")
Line = Sequence[tuple[int, float]]


def training_curves(study: Study, styles: Mapping[str, Style], key: str, title: str, axis: str) -> Plot | None:
    """A quantity over the epochs: a group's mean as a line, its trials as faint ones, cuts as triangles."""
    found = [(group, [c for trial in group.trials if len(c := _history(trial, key)) > 1]) for group in study.groups]
    found = [(group, lines) for group, lines in found if lines]
    if not found or (key == "macs" and len({y for _, lines in found for line in lines for _, y in line}) < 2):
        return None
    axes, cuts, drawn = new_axes(3.3, "Epoch", axis), False, 0
    for group, lines in found:
        colour = styles[group.label].colour.light
        look: dict[str, Any] = {"color": colour, "drawstyle": "steps-post" if key == "macs" else "default"}
        for line in lines if len(lines) > 1 else ():
            axes.plot(*zip(*line, strict=True), **look, linewidth=0.6, alpha=0.22)
        # One-shot methods share the control's curve at first: dashes keep both visible.
        control = group.label == study.control
        look |= {"linestyle": (0, (3, 1.6)), "zorder": 3} if control else {"linestyle": _DASHES[drawn // 8 % 4]}
        drawn += not control
        mean = _mean_curve(lines)
        axes.plot(list(mean), list(mean.values()), **look, label=label_text(group.label))
        moments = [x for x in sorted({x for trial in group.trials for x in cut_epochs(trial)}) if x in mean]
        mark = {"color": colour, "markersize": 6.5, "markeredgecolor": PAPER.light}
        axes.plot(moments, [mean[x] for x in moments], "v", **mark)
        cuts = cuts or bool(moments)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True)
    caption = "Lines: means over the trials, which are drawn faintly."
    caption += " Triangles: the moments of pruning." if cuts else ""
    caption += _scale_curves(axes, key, [line for _, lines in found for line in lines])
    return finish(f"curve_{key}", title, caption, axes)


def _scale_curves(axes: Any, key: str, lines: Sequence[Line]) -> str:
    """Scale the axis to what matters; returns what the caption must say of it."""
    values = [y for line in lines for _, y in line]
    if key == "macs":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: tick(y))
    if key == "train_loss":
        return " Logarithmic scale." if scale_axis(axes, "y", values, lambda y: f"{y:g}", 8) else ""
    if key == "validation_top1":
        # The steep rise of the first epochs would squeeze the part in which the methods differ.
        late = [y for line in lines for _, y in line[len(line) // 4 :]]
        low, high = min(late), max(values)
        if low - min(values) > 0.5 * (high - low):
            axes.set_ylim(bottom=low - 0.08 * (high - low))
            return " The axis leaves out the first epochs."
    return ""


def widths(study: Study, styles: Mapping[str, Style]) -> Plot | None:
    """Share of every layer's filters that is left, layer by layer."""
    before, groups = widths_before(study), cut_groups(study)
    layers = list(before)
    if len(layers) < 2 or not groups:
        return None
    axes = new_axes(3.5, y="Filters left")
    for group in groups:
        kept = [(i, w / before[name]) for i, name in enumerate(layers) if (w := mean_width(group, name)) is not None]
        _line(axes, kept, styles[group.label], group.label)
    step = -(-len(layers) // 16)
    slant = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 7.5}
    axes.set_xticks(range(0, len(layers), step), [label_text(name) for name in layers[::step]], **slant)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    caption = "Share of each layer’s filters that is left, mean over trials."
    return finish("widths", "Width of every layer after the cut", caption, axes)


def clusters(study: Study, styles: Mapping[str, Style], key: str, title: str, axis: str) -> Plot | None:
    """A figure of merit of the clusterings over the epochs: over layers and trials the mean, or the sum over layers."""
    found = [(group, _cluster_curve(group, key)) for group in study.groups]
    found = [(group, curve) for group, curve in found if len(curve) > 1]
    if not found:
        return None
    axes = new_axes(3.1, "Epoch", axis)
    for group, curve in found:
        _line(axes, curve, styles[group.label], group.label)
    axes.locator_params(axis="x", integer=True)
    caption = "Mean over layers and trials." if key == "cosine" else "Mean over trials."
    return finish(f"clusters_{key}", title, caption, axes)


def _line(axes: Any, points: Line, style: Style, label: str) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, marker=style.marker, markersize=4, color=style.colour.light, label=label_text(label))


def cut_epochs(trial: Record) -> list[int]:
    """Epochs, from 1 through all phases, in which the network became smaller."""
    macs = [entry.get("macs") for entry in trial.get("history") or ()]
    steps = enumerate(itertools.pairwise(macs), 2)
    return [epoch for epoch, (before, after) in steps if before and after and after < before]


def _history(trial: Record, key: str) -> list[tuple[int, float]]:
    """(epoch from 1 through all phases, value) of the epochs that have the value."""
    entries = enumerate(trial.get("history") or (), 1)
    return [(epoch, float(entry[key])) for epoch, entry in entries if isinstance(entry.get(key), int | float)]


def _mean_curve(lines: Sequence[Line]) -> dict[int, float]:
    """Mean at every epoch that all lines have, so that trials that ended early do not distort it."""
    points = [dict(line) for line in lines]
    common = [x for x in points[0] if all(x in line for line in points)]
    return {x: sum(line[x] for line in points) / len(points) for x in common}


def _cluster_curve(group: Group, key: str) -> list[tuple[int, float]]:
    values: dict[int, list[float]] = {}
    for trial in group.trials:
        for entry in trial.get("clusters_history") or ():
            if isinstance(entry.get(key), int | float):
                values.setdefault(int(entry["epoch"]), []).append(float(entry[key]))
    mean = key == "cosine"
    return [(epoch, sum(found) / (len(found) if mean else group.n)) for epoch, found in sorted(values.items())]
