"""Accuracy against the share of filters pruned away: one line for each method that was run with several shares."""

from __future__ import annotations

from collections.abc import Mapping

from .colours import PAPER, Look
from .drawing import Plot, add_legend, finish, label_text, new_axes
from .study import Study

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
