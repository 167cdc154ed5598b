"""Plots of trials and groups: differences, accuracy against costs, speed-ups; and the list of all plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .. import stats
from .costs import Speed, speeds
from .curves import clusters, training_curves, widths
from .figure import (
    BAND,
    DASHED,
    INK,
    MATPLOTLIB,
    MUTED,
    PAPER,
    Plot,
    Style,
    finish,
    interval_bars,
    label_text,
    method_style,
    name_rows,
    new_axes,
    scale_axis,
)
from .format import signed, significant, tick
from .study import MACS, SECONDS, TOP1, TOP5, TRAIN_MACS, TRAIN_SECONDS, Measure, Study, call_seconds
from .verdict import Judgement

Styles = Mapping[str, Style]
Points = Sequence[tuple[float, float]]
MEANS = "Small marks: trials. Large marks: means, with 95 % intervals."


def all_plots(study: Study, styles: Styles, judgements: Sequence[Judgement]) -> list[Plot]:
    """All plots that the study has material for, in reading order."""
    import matplotlib

    sizes = study.batch_sizes
    costs = (
        (MACS, "accuracy_macs", "work", "MACs for one image"),
        (SECONDS, "accuracy_time", "inference time", "Inference, seconds"),
        (TRAIN_SECONDS, "accuracy_training", "training time", "Training, seconds"),
        (TRAIN_MACS, "accuracy_training_macs", "training work", "MACs of training"),
    )
    quantities = (
        ("validation_top1", "Validation top-1 while training", "Validation top-1, %"),
        ("train_loss", "Loss while training", "Training loss"),
        ("macs", "Work for one image while training", "MACs"),
    )
    candidates: list[Callable[[], Plot | None]] = [
        partial(differences, styles, judgements),
        *(partial(scatter, study, styles, *cost) for cost in costs),
        *(partial(accuracy_speedup, study, styles, size) for size in sorted({*sizes[:1], *sizes[-1:]})),
        partial(speedups, study, styles),
        partial(shares, study, styles),
        partial(crossover, study),
        *(partial(every_trial, study, styles, measure) for measure in (SECONDS, TOP1, TOP5)),
        *(partial(training_curves, study, styles, *quantity) for quantity in quantities),
        partial(widths, study, styles),
        partial(clusters, study, styles, "cosine", "Cluster quality", "Mean cosine to the centroid"),
        partial(clusters, study, styles, "changed", "Filters that changed cluster", "Filters changed, all layers"),
    ]
    with matplotlib.rc_context(MATPLOTLIB):
        return [plot for draw in candidates if (plot := draw()) is not None]


def differences(styles: Styles, judgements: Sequence[Judgement]) -> Plot | None:
    """Difference in top-1 from the control with its 90 % interval, against the margin."""
    found = [(j, j.tost) for j in judgements if j.top1 and j.tost]
    if not found:
        return None
    margin, control = found[0][0].margin, found[0][0].control.label
    axes = new_axes(0.9 + 0.32 * len(found), f"Top-1 against {label_text(control)}, points")
    axes.axvspan(-margin, margin, color=BAND.light, zorder=0, linewidth=0)
    axes.axvline(0, color=INK.light, linewidth=0.9, zorder=1)
    # Single trials, which have no interval, may lie far out: they must not squeeze the intervals.
    bounds = [x for _, tost in found if tost.low is not None and tost.high is not None for x in (tost.low, tost.high)]
    shown = [-margin, margin, *(bounds or [tost.value for _, tost in found])]
    pad = 0.06 * (max(shown) - min(shown))
    low, high, outside = min(shown) - pad, max(shown) + pad, False
    axes.set_xlim(low, high)
    for row, (j, tost) in enumerate(found):
        style, colour = styles[j.group.label], styles[j.group.label].colour.light
        if tost.low is not None:
            axes.plot([tost.low, tost.high], [row, row], color=colour, linewidth=2.6, solid_capstyle="round")
        place = min(max(tost.value, low + pad / 2), high - pad / 2)
        mark = {"color": colour, "markersize": 6.5, "markeredgecolor": PAPER.light}
        if low < tost.value < high:
            axes.plot(tost.value, row, style.marker, **mark)
        else:
            outside = True
            left = tost.value <= low
            axes.plot(place, row, "<" if left else ">", color=colour, markersize=6, markerfacecolor="none")
            beside: dict[str, Any] = {"xytext": (7 if left else -7, 0), "ha": "left" if left else "right"}
            beside |= {"textcoords": "offset points", "va": "center", "color": MUTED.light, "fontsize": 8}
            axes.annotate(signed(tost.value, 1), (place, row), **beside)
    name_rows(axes, [j.group.label for j, _ in found])
    caption = (
        f"Means with 90 % intervals. Right of the shaded band’s left edge (−{margin:g}): no worse; inside the band: "
        "equivalent."
    )
    caption += f" The verdict corrects for all {len(found)}." if len(found) > 1 else ""
    caption += " Arrows: single trials off the scale." if outside else ""
    return finish("difference", f"Top-1 against {control}", caption, axes)


def scatter(study: Study, styles: Styles, cost: Measure, name: str, what: str, axis: str) -> Plot | None:
    """Top-1 against a cost: every trial a point, group means with 95 % intervals."""
    found = {g.label: points for g in study.groups if (points := g.pairs(cost, TOP1))}
    costs = [x for points in found.values() for x, _ in points]
    if len(set(costs)) < 2:
        return None
    axes = new_axes(3.5, axis, "Top-1, %")
    middles = {label: sum(x for x, _ in points) / len(points) for label, points in found.items()}
    shifts = _side_by_side(middles)
    for label, points in found.items():
        bars = interval_bars([x for x, _ in points])
        _points(axes, points, middles[label], bars, styles[label], label, shifts[label])

    def text(x: float) -> str:
        return tick(x) if cost.kind == "count" else f"{float(significant(x, 3)):g}"

    if not scale_axis(axes, "x", costs, text, 5):
        axes.set_xlim(left=0)
    note = " Groups that cost the same stand side by side." if any(shifts.values()) else ""
    return finish(name, f"Accuracy against {what}", MEANS + note, axes)


def accuracy_speedup(study: Study, styles: Styles, size: int) -> Plot | None:
    """Top-1 against the measured speed-up at a batch size: every trial a point, group means with 95 % intervals."""
    control, measure = study.reference, call_seconds(size)
    theirs = control.values(measure) if control else []
    found = {speed.group.label: speed.ratio for speed in speeds(study) if speed.size == size}
    if control is None or not theirs or len(found) < 2:
        return None
    typical, every = _geometric_mean(theirs), []
    axes = new_axes(3.5, f"Speed-up over {label_text(control.label)} at batch {size}", "Top-1, %")
    axes.axvline(1, color=MUTED.light, linewidth=0.8, linestyle=DASHED, zorder=1)
    for group in study.groups:
        points = [(typical / seconds, top1) for seconds, top1 in group.pairs(measure, TOP1)]
        if points:
            xs = [x for x, _ in points]
            middle, bars = _ratio_bars(found[group.label]) or (_geometric_mean(xs), None)
            _points(axes, points, middle, bars, styles[group.label], group.label)
            every += xs
    scale_axis(axes, "x", every, _ratio_text, 4)
    title = f"Accuracy against measured speed-up, batch {size}"
    return finish(f"accuracy_speedup_{size}", title, f"{MEANS} Right: faster. Up: more accurate.", axes)


def _side_by_side(middles: Mapping[str, float]) -> dict[str, float]:
    """Label → shift in typographic points, so that the marks of groups with the same cost don't hide each other.

    >>> _side_by_side({"a": 1.0, "b": 1.0, "c": 9.0})
    {'a': -4.0, 'b': 4.0, 'c': 0.0}
    """
    near = 0.02 * (max(middles.values()) - min(middles.values()))
    shifts = {}
    for label, middle in middles.items():
        same = [other for other, value in middles.items() if abs(value - middle) <= near]
        shifts[label] = 8.0 * (same.index(label) - (len(same) - 1) / 2)
    return shifts


def _points(
    axes: Any,
    points: Points,
    middle: float,
    bars: list[list[float]] | None,
    style: Style,
    label: str,
    shift: float = 0.0,
) -> None:
    """A group's trials as small marks, its mean as a large one with intervals both ways, and its legend entry."""
    from matplotlib.transforms import ScaledTranslation

    xs, ys = zip(*points, strict=True)
    colour, marker = style.colour.light, style.marker
    aside = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot(xs, ys, marker, color=colour, alpha=0.4, markersize=4, markeredgewidth=0, transform=aside)
    axes.update_datalim(list(zip(xs, ys, strict=True)))
    axes.autoscale_view()
    mark: dict[str, Any] = {"fmt": marker, "markersize": 7, "markeredgecolor": PAPER.light, "color": colour}
    axes.errorbar(middle, sum(ys) / len(ys), xerr=bars, yerr=interval_bars(ys), elinewidth=1.1, transform=aside, **mark)
    axes.plot([], [], marker, color=colour, markersize=6, markeredgewidth=0, label=label_text(label))


def speedups(study: Study, styles: Styles) -> Plot | None:
    """Speed-up of every group at every batch size with its interval; at the right the ratio of MACs."""
    found = [speed for speed in speeds(study) if speed.ratio is not None]
    groups: dict[str, list[Speed]] = {}
    for speed in found:
        groups.setdefault(speed.group.label, []).append(speed)
    sizes = sorted({speed.size for speed in found})
    if len(sizes) < 2:
        return None
    work = [speed.macs_ratio for speed in found if speed.macs_ratio]
    axes = new_axes(3.3, "Images a call" + ("; right: ratio of MACs" if work else ""))
    axes.set_ylabel(f"Speed-up over {label_text(study.control or '')}")
    axes.axhline(1, color=MUTED.light, linewidth=0.8, linestyle=DASHED, zorder=1)
    for place, (label, own) in enumerate(groups.items()):
        # Side by side: intervals on top of each other can't be read.
        _speedup_line(axes, own, sizes, 0.5 * (place - (len(groups) - 1) / 2) / len(groups), styles[label])
    scale_axis(axes, "y", [speed.ratio.value for speed in found if speed.ratio] + work, _ratio_text, 4)
    names = [*map(str, sizes), *(["MACs"] if work else [])]
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)
    caption = "Means over the trials, with 95 % intervals."
    if work:
        caption += " The hollow marks at the right: the speed-up if time went with multiply-accumulates."
    return finish("speedups", "Speed-up at every batch size", caption, axes)


def _speedup_line(axes: Any, own: Sequence[Speed], sizes: Sequence[int], shift: float, style: Style) -> None:
    """One group's speed-ups over the batch sizes, and its ratio of MACs."""
    colour, xs, ys = style.colour.light, [], []
    for speed in own:
        middle, bars = _ratio_bars(speed.ratio) or (1.0, None)
        xs.append(sizes.index(speed.size) + shift)
        ys.append(middle)
        axes.errorbar(xs[-1], middle, yerr=bars, color=colour, elinewidth=1.1, fmt="none")
    mark: dict[str, Any] = {"marker": style.marker, "color": colour}
    label = label_text(own[0].group.label)
    axes.plot(xs, ys, **mark, markersize=5.5, markeredgecolor=PAPER.light, label=label)
    if own[0].macs_ratio:
        axes.plot(len(sizes) + shift, own[0].macs_ratio, **mark, markersize=6, markerfacecolor="none")


def _ratio_bars(ratio: stats.Difference | None) -> tuple[float, list[list[float]] | None] | None:
    """A ratio, and the distances to the ends of its interval."""
    if ratio is None:
        return None
    if ratio.low is None or ratio.high is None:
        return ratio.value, None
    return ratio.value, [[ratio.value - ratio.low], [ratio.high - ratio.value]]


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.3g}×"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def shares(study: Study, styles: Styles) -> Plot | None:
    """Top-1 of every method against the share pruned from each layer: trials as points, means as a line.

    None unless some method was run with at least two shares.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for group in study.groups:
        for trial in group.trials:
            keep, top1 = (trial.get("options") or {}).get("keep"), (trial.get("result") or {}).get("top1")
            if isinstance(keep, int | float) and top1 is not None:
                lines.setdefault(group.method, {}).setdefault(round(100 * (1 - keep), 6), []).append(top1)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    axes = new_axes(3.4, "Filters pruned away from every layer, %", "Top-1, %")
    for index, (method, points) in enumerate(lines.items()):
        style = method_style(index)
        look: dict[str, Any] = {"color": style.colour.light, "marker": style.marker}
        for share, values in points.items():
            axes.plot([share] * len(values), values, **look, alpha=0.4, markersize=4, linestyle="none")
        means = sorted((share, sum(values) / len(values)) for share, values in points.items())
        label = label_text(method)
        axes.plot(*zip(*means, strict=True), **look, markersize=6, markeredgecolor=PAPER.light, label=label)
    caption, control = "Small marks: trials. Lines: means.", study.reference
    if control and (mean := control.mean(TOP1)) is not None:
        axes.axhline(mean, color=styles[control.label].colour.light, linewidth=1, linestyle=DASHED)
        caption += f" Dashed: {control.label}."
    return finish("accuracy_shares", "Accuracy against the share pruned", caption, axes)


def crossover(study: Study) -> Plot | None:
    """Top-1 against the length of training, and where fresh weights catch up with inherited ones.

    None unless methods were trained for several numbers of epochs.
    """
    lines = lengths(study)
    if not any(len(line) > 1 for line in lines.values()):
        return None
    axes = new_axes(3.6, "Epochs of training", "Top-1, %")
    for index, ((method, budget), line) in enumerate(lines.items()):
        style = method_style(index)
        look: dict[str, Any] = {"color": style.colour.light, "marker": style.marker}
        for epochs, values in line.items():
            axes.plot([epochs] * len(values), values, **look, alpha=0.4, markersize=4, linestyle="none")
        dashes = DASHED if method.startswith("scratch") else "-"
        means = {epochs: sum(values) / len(values) for epochs, values in line.items()}
        label = label_text(" ".join(filter(None, (method, budget))))
        axes.plot(list(means), list(means.values()), **look, linestyle=dashes, markersize=6, label=label)
    longest = max(epochs for line in lines.values() for epochs in line)
    axes.set_xscale("symlog", base=2, linthresh=1)
    every = sorted({epochs for line in lines.values() for epochs in line})
    axes.set_xticks(every, [str(epochs) for epochs in every])
    axes.minorticks_off()
    said = []
    for scratch, inherited, at, top1 in catching_up(lines):
        if at is None:
            said.append(f"{scratch} stays behind {inherited} up to {longest} epochs.")
            continue
        said.append(f"{scratch} catches up with {inherited} at {at} epochs.")
        axes.plot(at, top1, "o", color=INK.light, markersize=12, markerfacecolor="none", zorder=4)
    rings = " Rings: where fresh weights catch up." if any(" catches " in text for text in said) else ""
    caption = " ".join(["Small marks: trials. Lines: means. Dashed: from fresh weights." + rings, *said])
    return finish("crossover", "Accuracy against the length of training", caption, axes)


Lengths = Mapping[tuple[str, str], Mapping[int, Sequence[float]]]


def lengths(study: Study) -> Lengths:
    """(Method, budget) → epochs → top-1 of the trials, for trials whose numbers of epochs were asked for."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for group in study.groups:
        for trial in group.trials:
            epochs, top1 = (trial.get("options") or {}).get("epochs"), (trial.get("result") or {}).get("top1")
            if isinstance(epochs, int) and top1 is not None:
                budget = " ".join(part for part in group.label.split()[1:] if not part.startswith("epochs="))
                found.setdefault((group.method, budget), {}).setdefault(epochs, []).append(top1)
    return {name: dict(sorted(line.items())) for name, line in found.items()}


def catching_up(lines: Lengths) -> list[tuple[str, str, int | None, float]]:
    """For each method from fresh weights and each other of the same budget: where its mean is first no lower.

    **Returns:** (the one, the other, epochs or None, top-1 there).

    >>> lines = {("scratch", ""): {1: [20.0], 2: [41.0, 43.0]}, ("l1", ""): {1: [40.0], 2: [41.5]}}
    >>> catching_up(lines)
    [('scratch', 'l1', 2, 42.0)]
    """
    found: list[tuple[str, str, int | None, float]] = []
    for (fresh, budget), line in lines.items():
        for (method, other), theirs in lines.items():
            if not fresh.startswith("scratch") or method.startswith("scratch") or other != budget:
                continue
            means = {n: (sum(line[n]) / len(line[n]), sum(theirs[n]) / len(theirs[n])) for n in line if n in theirs}
            at = next((epochs for epochs, (own, those) in means.items() if own >= those), None)
            names = [" ".join(filter(None, (name, budget))) for name in (fresh, method)]
            found.append((names[0], names[1], at, means[at][0] if at is not None else math.nan))
    return found


def every_trial(study: Study, styles: Styles, measure: Measure) -> Plot | None:
    """Every trial of one measure, one row a group, with the mean as a line."""
    samples = study.samples(measure)
    if len(samples) < 2:
        return None
    axes = new_axes(0.8 + 0.3 * len(samples), measure.heading)
    for row, (label, values) in enumerate(samples.items()):
        style = styles[label]
        # Spread over the row by order, so that equal values stay visible and no random state is used.
        heights = [row + 0.22 * ((i % 3) - 1) / 1.5 for i in range(len(values))]
        axes.plot(values, heights, style.marker, color=style.colour.light, alpha=0.7, markersize=5, markeredgewidth=0)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [row - 0.34, row + 0.34], color=INK.light, linewidth=1.6)
    name_rows(axes, list(samples))
    axes.locator_params(axis="x", nbins=6)
    if measure.kind == "seconds":
        axes.set_xlim(left=0)
    return finish(f"trials_{measure.key}", f"{measure.title} of every trial", "Marks: trials. Lines: means.", axes)
