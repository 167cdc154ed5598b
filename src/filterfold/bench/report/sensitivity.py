"""Curves of a sensitivity sweep: what each layer loses when it is pruned alone (Li et al. 2017, Figures 2, 6 and 7)."""

from __future__ import annotations

from pathlib import Path

from ..sensitivity import Sensitivity
from .figure import DASHED, INK, MATPLOTLIB, MUTED, Plot, finish, label_text, method_style, new_axes, step_colour
from .format import number
from .table import Table, cell

NAMED = 5
"""So many of the most sensitive layers are named in the plot; more would lie on each other."""


def sensitivity_plots(found: Sensitivity) -> list[Plot]:
    """One figure of all layers for each criterion, and one of the criteria's means."""
    import matplotlib

    with matplotlib.rc_context(MATPLOTLIB):
        plots = [_layers(found, criterion) for criterion in found.criteria]
        return [*plots, _means(found)] if len(found.criteria) > 1 and len(found.ratios) > 1 else plots


def sensitivity_table(found: Sensitivity) -> Table:
    """Layer by criterion and ratio: top-1 without retraining."""
    heads = [(criterion, ratio) for criterion in found.criteria for ratio in found.ratios]
    rows = []
    for layer in found.layers:
        top1 = {(point.criterion, point.ratio): point.top1 for point in layer.points}
        cells = [cell(top1.get(head), number(top1.get(head), "percent")) for head in heads]
        rows.append((cell(layer.group), cell(layer.stage), cell(layer.size), *cells))
    means = [cell(mean := found.mean(*head), number(mean, "percent")) for head in heads]
    rows.append((cell("mean over layers"), cell(""), cell(""), *means))
    columns = ("Layer", "Stage", "Filters", *(f"{criterion} {ratio:.0%}" for criterion, ratio in heads))
    title = f"Top-1 with one layer pruned, no retraining; whole network {found.base['top1']:.2f} %"
    notes = (f"{found.images} images; " + "; ".join(f"{key}: {value}" for key, value in found.conditions.items()),)
    return Table("sensitivity", title, columns, tuple(rows), notes)


def write(found: Sensitivity, folder: Path) -> list[Path]:
    """Write curves (SVG, PNG), the table (CSV, Markdown) and the sweep itself (JSON) to a folder.

    **Returns:** the paths.
    """
    folder = Path(folder)
    found.write(folder / "sensitivity.json")
    paths = [folder / "sensitivity.json", *sensitivity_table(found).write(folder)]
    for plot in sensitivity_plots(found):
        paths += plot.write(folder)
    return paths


def _layers(found: Sensitivity, criterion: str) -> Plot:
    curves = {layer: layer.curve(criterion) for layer in found.layers}
    ranked = sorted(curves, key=lambda layer: sum(point.top1 for point in curves[layer]))
    stages = sorted({layer.stage for layer in found.layers})
    named = ranked[:NAMED]
    axes = new_axes(3.6, "Filters pruned away, %", "Top-1 without retraining, %")
    for layer, curve in curves.items():
        colour = step_colour(stages.index(layer.stage), len(stages))
        xs, ys = [0.0, *(100 * point.ratio for point in curve)], [found.base["top1"], *(point.top1 for point in curve)]
        if layer in named:
            mark = "osD^v"[named.index(layer) % 5]
            axes.plot(xs, ys, color=colour.light, marker=mark, markersize=4, label=label_text(layer.group))
        else:
            axes.plot(xs, ys, color=colour.light, linewidth=0.8, alpha=0.7)
    axes.axhline(found.base["top1"], color=INK.light, linewidth=0.8, linestyle=DASHED)
    axes.set_xlim(0, 100)
    caption = (
        f"Each layer pruned alone by {criterion}; colours run from the first stage (pale) to the last (deep); the "
        f"{len(named)} layers that lose most on average are named. Dashed: the whole network. {found.images} images."
    )
    return finish(f"sensitivity_{criterion}", f"Sensitivity of each layer, {criterion}", caption, axes)


def _means(found: Sensitivity) -> Plot:
    axes = new_axes(3.2, "Filters of one layer pruned away, %", "Top-1, mean over layers, %")
    for index, criterion in enumerate(found.criteria):
        ys = [found.base["top1"], *(found.mean(criterion, ratio) for ratio in found.ratios)]
        style, xs = method_style(index), [0.0, *(100 * ratio for ratio in found.ratios)]
        mark = {"marker": style.marker, "markersize": 4, "label": label_text(criterion)}
        axes.plot(xs, ys, color=style.colour.light, **mark)
    axes.axhline(found.base["top1"], color=MUTED.light, linewidth=0.8, linestyle=DASHED)
    axes.set_xlim(0, 100)
    caption = "Mean over the layers, each pruned alone, without retraining."
    return finish("sensitivity_means", "Criteria compared", caption, axes)
