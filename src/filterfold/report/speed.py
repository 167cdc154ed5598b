"""Plots of measured speed-up: against accuracy, and over batch sizes beside the ratio of multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import stats
from .colours import MUTED, PAPER, Look
from .costs import Speed, speeds
from .drawing import Plot, add_legend, finish, interval_bars, label_text, new_axes
from .study import TOP1, Study, calls, value


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
