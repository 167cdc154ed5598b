"""All plots of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .curves import accuracy_speedup, clusters, curves, speedups, widths
from .figure import BAND, INK, PAPER, STYLE, Look, Plot, add_legend, finish, interval_bars, label_text, new_axes
from .format import plain, significant, tick
from .study import MACS, SECONDS, TOP1, TOP5, TRAIN_MACS, TRAIN_SECONDS, Group, Measure, Study, batch_sizes
from .verdict import Judgement

DISTINCT = 6
"""The first so many groups have hues of their own; a method is drawn in one of these, with a marker of its own."""


MARKERS = "DX^vP*osh<>"


def shares(study: Study, looks: Mapping[str, Look]) -> Plot | None:
    """Top-1 of every method against the share pruned from each layer: trials as points, means as a line.

    None unless some method was run with at least two shares.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for group in study.groups:
        for trial in group.trials:
            keep = trial.get("options", {}).get("keep")
            result = trial.get("result") or {}
            if isinstance(keep, int | float) and result.get("top1") is not None:
                lines.setdefault(group.method, {}).setdefault(round(100 * (1 - keep), 6), []).append(result["top1"])
    if not any(len(points) > 1 for points in lines.values()):
        return None
    control = [trial["result"]["top1"] for trial in (study.reference.trials if study.reference else ())]
    colours = [looks[group.label].colour.light for group in study.others][:DISTINCT]
    with new_axes(3.4) as (figure, axes):
        for index, (method, points) in enumerate(lines.items()):
            style = {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}
            for share, values in points.items():
                axes.plot([share] * len(values), values, **style, alpha=0.4, markersize=4, linestyle="none")
            places = sorted(points)
            means = [sum(points[share]) / len(points[share]) for share in places]
            axes.plot(places, means, **style, markersize=6, markeredgecolor=PAPER.light, label=label_text(method))
        if control and study.control is not None:
            colour = looks[study.control].colour.light
            axes.axhline(sum(control) / len(control), color=colour, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xlabel("Filters pruned away from every layer, %")
        axes.set_ylabel("Top-1, %")
        add_legend(figure, len(lines))
    caption = "Small marks: trials. Lines: means." + (f" Dashed: {study.control}." if control else "")
    return finish("accuracy_shares", "Accuracy against the share pruned", caption, figure)


def every(study: Study, looks: Mapping[str, Look], judgements: Sequence[Judgement]) -> list[Plot]:
    """All plots that the study has material for, in reading order."""
    import matplotlib

    candidates: list[Callable[[], Plot | None]] = [
        lambda: forest(looks, judgements),
        lambda: scatter(study, looks, MACS, "accuracy_macs", "Accuracy against work", "MACs for one image"),
        lambda: scatter(
            study, looks, SECONDS, "accuracy_time", "Accuracy against inference time", "Inference, seconds"
        ),
        *(partial(accuracy_speedup, study, looks, size) for size in _ends(batch_sizes(study))),
        lambda: speedups(study, looks),
        lambda: scatter(
            study, looks, TRAIN_SECONDS, "accuracy_training", "Accuracy against training time", "Training, seconds"
        ),
        lambda: scatter(
            study, looks, TRAIN_MACS, "accuracy_training_macs", "Accuracy against training work", "MACs of training"
        ),
        lambda: shares(study, looks),
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
    with matplotlib.rc_context(STYLE):
        return [plot for make in candidates if (plot := make()) is not None]


def forest(looks: Mapping[str, Look], judgements: Sequence[Judgement]) -> Plot | None:
    """Difference in top-1 from the control with its 90 % interval, against the margin."""
    found = [j for j in judgements if j.top1 and j.tost]
    if not found:
        return None
    margin, control = found[0].margin, found[0].control.label
    with new_axes(0.9 + 0.32 * len(found)) as (figure, axes):
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
        axes.set_yticks(range(len(found)), [label_text(j.group.label) for j in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK.light)
        axes.set_xlabel(f"Top-1 against {label_text(control)}, points")
    caption = (
        f"Mean difference in top-1 from {control}, with the 90 % interval of the equivalence test. An interval right "
        f"of the shaded band’s left edge (−{plain(margin)}) speaks for “no worse”, one inside the band for "
        "“equivalent”."
    )
    if len(found) > 1:
        caption += f" Each interval stands for itself; the verdict corrects for all {len(found)}."
    return finish("difference", f"Top-1 against {control}", caption, figure)


def scatter(study: Study, looks: Mapping[str, Look], cost: Measure, name: str, title: str, axis: str) -> Plot | None:
    """Top-1 against a cost: every trial a point, group means with 95 % intervals."""
    found = [(group, _pairs(group, cost)) for group in study.groups]
    found = [(group, points) for group, points in found if points]
    if len({x for _, points in found for x, _ in points}) < 2:
        return None
    with new_axes(3.5) as (figure, axes):
        for group, points in found:
            look, colour = looks[group.label], looks[group.label].colour.light
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, look.marker, color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
            bars = {"xerr": interval_bars(xs), "yerr": interval_bars(ys), "elinewidth": 1.1, "color": colour}
            mark = {"fmt": look.marker, "markersize": 7, "markeredgecolor": PAPER.light}
            axes.errorbar(sum(xs) / len(xs), sum(ys) / len(ys), **bars, **mark)
            axes.plot([], [], look.marker, color=colour, markersize=6, markeredgewidth=0, label=label_text(group.label))
        _cost_axis(axes, [x for _, points in found for x, _ in points], cost)
        axes.set_xlabel(axis)
        axes.set_ylabel("Top-1, %")
        add_legend(figure, len(found))
    return finish(name, title, "Small marks: trials. Large marks: means, with 95 % intervals.", figure)


def strip(study: Study, looks: Mapping[str, Look], measure: Measure) -> Plot | None:
    """Every trial of one measure, one row a group, with the mean as a line."""
    samples = study.samples(measure)
    if len(samples) < 2:
        return None
    with new_axes(0.8 + 0.3 * len(samples)) as (figure, axes):
        for row, (label, values) in enumerate(samples.items()):
            look = looks[label]
            # Spread over the row by order, so that equal values stay visible and no random state is used.
            heights = [row + 0.22 * ((i % 3) - 1) / 1.5 for i in range(len(values))]
            axes.plot(values, heights, look.marker, color=look.colour.light, alpha=0.7, markersize=5, markeredgewidth=0)
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.34, row + 0.34], color=INK.light, linewidth=1.6)
        axes.set_yticks(range(len(samples)), [label_text(label) for label in samples])
        axes.set_ylim(len(samples) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK.light)
        axes.set_xlabel(f"{measure.title}, {measure.unit}")
        axes.locator_params(axis="x", nbins=6)
        if measure.kind == "seconds":
            axes.set_xlim(left=0)
    return finish(f"trials_{measure.key}", f"{measure.title} of every trial", "Marks: trials. Lines: means.", figure)


def _ends(sizes: Sequence[int]) -> list[int]:
    """The smallest and the largest."""
    return sorted({*sizes[:1], *sizes[-1:]})


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
    return tick(x) if cost.kind == "count" else significant(x, 3).rstrip("0").rstrip(".") if x % 1 else f"{x:g}"


def _pairs(group: Group, cost: Measure) -> list[tuple[float, float]]:
    found = []
    for trial in group.trials:
        single = Group(group.label, group.method, group.clusters, (trial,))
        xs, ys = single.values(cost), single.values(TOP1)
        if xs and ys:
            found.append((xs[0], ys[0]))
    return found
