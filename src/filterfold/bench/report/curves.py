"""Plots over a quantity: accuracy over widths, and speed-up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import stats
from .cost_tables import Speed, speeds
from .figure import MUTED, PAPER, Look, Plot, add_legend, finish, interval_bars, label_text, new_axes
from .format import tick
from .study import TOP1, Group, Record, Study, calls, value
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


def accuracy_speedup(study: Study, looks: Mapping[str, Look], size: int) -> Plot | None:
    """Top-1 against the measured speed-up at a batch size: every trial a point, group means with 95 % intervals."""
    control = study.reference
    theirs = control.values(calls(size)) if control else []
    found = {speed.group.label: speed for speed in speeds(study) if speed.size == size}
    if control is None or not theirs or len(found) < 2:
        return None
    typical = math.exp(sum(map(math.log, theirs)) / len(theirs))
    every = []
    with new_axes(3.5) as (figure, axes):
        axes.axvline(1, color=MUTED.light, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        for group in study.groups:
            both = [(value(trial, calls(size).key), value(trial, TOP1.key)) for trial in group.trials]
            points = [(typical / seconds, top1) for seconds, top1 in both if seconds and top1 is not None]
            if not points:
                continue
            every += [x for x, _ in points]
            _cloud(axes, points, _ratio_bars(found[group.label].ratio), looks[group.label], group.label)
        _ratio_axis(axes.xaxis, axes.set_xscale, every)
        axes.set_xlabel(f"Speed-up over {label_text(control.label)} at batch {size}")
        axes.set_ylabel("Top-1, %")
        add_legend(figure, len(found))
    caption = "Small marks: trials. Large marks: means, with 95 % intervals. Right: faster. Up: more accurate."
    return finish(f"accuracy_speedup_{size}", f"Accuracy against measured speed-up, batch {size}", caption, figure)


def _cloud(
    axes: Any, points: Sequence[tuple[float, float]], bars: tuple[float, Any] | None, look: Look, label: str
) -> None:
    xs, ys, colour = [x for x, _ in points], [y for _, y in points], look.colour.light
    axes.plot(xs, ys, look.marker, color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
    middle, xerr = bars or (math.exp(sum(map(math.log, xs)) / len(xs)), None)
    mark: dict[str, Any] = {"fmt": look.marker, "markersize": 7, "markeredgecolor": PAPER.light, "color": colour}
    axes.errorbar(middle, sum(ys) / len(ys), xerr=xerr, yerr=interval_bars(ys), elinewidth=1.1, **mark)
    axes.plot([], [], look.marker, color=colour, markersize=6, markeredgewidth=0, label=label_text(label))


def speedups(study: Study, looks: Mapping[str, Look]) -> Plot | None:
    """Speed-up of every group at every batch size with its interval; at the right the ratio of MACs."""
    found = [speed for speed in speeds(study) if speed.ratio is not None]
    groups: dict[str, list[Speed]] = {}
    for speed in found:
        groups.setdefault(speed.group.label, []).append(speed)
    sizes = sorted({speed.size for speed in found})
    if len(sizes) < 2:
        return None
    names = [str(size) for size in sizes]
    work = any(speed.macs_ratio for speed in found)
    with new_axes(3.3) as (figure, axes):
        axes.axhline(1, color=MUTED.light, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        for place, (label, own) in enumerate(groups.items()):
            _line(axes, own, sizes, 0.5 * (place - (len(groups) - 1) / 2) / len(groups), looks[label])
        ratios = [speed.ratio.value for speed in found if speed.ratio]
        _ratio_axis(axes.yaxis, axes.set_yscale, ratios + [speed.macs_ratio for speed in found if speed.macs_ratio])
        axes.set_xticks(range(len(names) + work), [*names, *(["MACs"] if work else [])])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Images a call" + ("; right: ratio of MACs" if work else ""))
        axes.set_ylabel(f"Speed-up over {label_text(study.control or '')}")
        add_legend(figure, len(groups))
    caption = "Means over the trials, with 95 % intervals." + (
        " The hollow marks at the right are what the speed-up would be if time went with multiply-accumulates."
        if work
        else ""
    )
    return finish("speedups", "Speed-up at every batch size", caption, figure)


def _line(axes: Any, own: Sequence[Speed], sizes: Sequence[int], shift: float, look: Look) -> None:
    """One group's speed-ups over the batch sizes, and its ratio of MACs."""
    colour, xs, ys = look.colour.light, [], []
    for speed in own:
        middle, bars = _ratio_bars(speed.ratio) or (1.0, None)
        xs.append(sizes.index(speed.size) + shift)
        ys.append(middle)
        axes.errorbar(xs[-1], middle, yerr=bars, color=colour, elinewidth=1.1, fmt="none")
    label = label_text(own[0].group.label)
    axes.plot(xs, ys, color=colour, marker=look.marker, markersize=5.5, markeredgecolor=PAPER.light, label=label)
    if own[0].macs_ratio:
        axes.plot(
            len(sizes) + shift, own[0].macs_ratio, look.marker, color=colour, markersize=6, markerfacecolor="none"
        )


def _ratio_bars(ratio: stats.Difference | None) -> tuple[float, list[list[float]] | None] | None:
    """A ratio, and the distances to the ends of its interval."""
    if ratio is None:
        return None
    if ratio.low is None or ratio.high is None:
        return ratio.value, None
    return ratio.value, [[ratio.value - ratio.low], [ratio.high - ratio.value]]


def _ratio_axis(axis: Any, set_scale: Any, values: Sequence[float]) -> None:
    """Ratios: logarithmic where they spread."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if max(values) > 4 * min(values):
        set_scale("log")
        axis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if max(values) < 12 * min(values) else (1.0, 2.0, 5.0))
        )
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda x, _: f"{x:.3g}×")
