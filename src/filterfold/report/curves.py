"""Plots of what happened inside: training curves with their cuts, widths of layers, quality of clusters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .colours import PAPER, Look
from .drawing import Plot, add_legend, finish, label_text, new_axes
from .numbers import tick
from .study import Group, Record, Study
from .tables import mean_width


def curves(study: Study, looks: Mapping[str, Look], key: str, title: str, axis: str) -> Plot | None:
    """A quantity over the epochs: mean of a group as a line, trials as faint ones, cuts as marks."""
    found = [(group, [c for trial in group.trials if len(c := _history(trial, key)) > 1]) for group in study.groups]
    found = [(group, lines) for group, lines in found if lines]
    if not found or (key == "macs" and len({y for _, lines in found for line in lines for _, y in line}) < 2):
        return None
    cuts = False
    with new_axes(3.3) as (figure, axes):
        for group, lines in found:
            colour = looks[group.label].colour.light
            style: dict[str, Any] = {"color": colour, "drawstyle": "steps-post" if key == "macs" else "default"}
            if group.label == study.control:  # one-shot methods begin with its very curve: neither may hide the other
                style |= {"linestyle": (0, (3, 1.6)), "zorder": 3}
            for line in lines if len(lines) > 1 else ():
                axes.plot(*zip(*line, strict=True), **style | {"linewidth": 0.6, "alpha": 0.22, "linestyle": "-"})
            mean = _mean_curve(lines)
            axes.plot(list(mean), list(mean.values()), **style, label=label_text(group.label))
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
        add_legend(figure, len(found))
    caption = "Lines: means over the trials, which are drawn faintly." + (
        " Triangles: the moments of pruning." if cuts else ""
    )
    return finish(f"curve_{key}", title, caption + notes, figure)


def _curve_axis(axes: Any, key: str, lines: Sequence[Sequence[tuple[int, float]]]) -> str:
    """Scale the axis to what matters, and say so."""
    values = [y for line in lines for _, y in line]
    if key == "macs":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: tick(y))
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
    with new_axes(3.5) as (figure, axes):
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
                label=label_text(group.label),
            )
        step = -(-len(layers) // 16)
        axes.set_xticks(
            range(0, len(layers), step),
            [label_text(name) for name in layers[::step]],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
            fontsize=7.5,
        )
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        axes.set_ylabel("Filters left")
        add_legend(figure, len(groups))
    return finish(
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
    with new_axes(3.1) as (figure, axes):
        for group, curve in found:
            look = looks[group.label]
            axes.plot(
                list(curve),
                list(curve.values()),
                marker=look.marker,
                markersize=4,
                color=look.colour.light,
                label=label_text(group.label),
            )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(axis)
        axes.locator_params(axis="x", integer=True)
        add_legend(figure, len(found))
    return finish(
        f"clusters_{key}", title, "Mean over layers and trials." if key == "cosine" else "Mean over trials.", figure
    )


def cut_epochs(trial: Record) -> list[int]:
    """Epochs, from 1 through all phases, in which the network became smaller."""
    macs = [entry.get("macs") for entry in trial.get("history") or ()]
    steps = enumerate(itertools.pairwise(macs), 2)
    return [epoch for epoch, (before, after) in steps if before and after and after < before]


def _history(trial: Record, key: str) -> list[tuple[int, float]]:
    """(epoch from 1 through all phases, value) of the epochs that have the value."""
    entries = enumerate(trial.get("history") or (), 1)
    return [(epoch, float(entry[key])) for epoch, entry in entries if isinstance(entry.get(key), int | float)]


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
