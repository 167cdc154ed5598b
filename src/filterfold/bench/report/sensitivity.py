"""Curves of a sensitivity sweep: what each layer loses when it is pruned alone (Li et al. 2017, Figures 2, 6 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...utils.io import write_atomically, write_text
from ..sensitivity import Layer, Sensitivity
from .figure import INK, MUTED, STYLE, Plot, add_legend, finish, label_text, new_axes, oklch
from .table import Cell, Table

NAMED = 5
"""So many of the most sensitive layers are named in the plot; more would lie on each other."""


def sensitivity_plots(found: Sensitivity) -> list[Plot]:
    """One figure of all layers for each criterion, and one of the criteria's means."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        plots = [_layers(found, criterion) for criterion in found.criteria]
        return [*plots, _means(found)] if len(found.criteria) > 1 and len(found.ratios) > 1 else plots


def sensitivity_table(found: Sensitivity) -> Table:
    """Layer by criterion and ratio: top-1 without retraining."""
    heads = [(criterion, ratio) for criterion in found.criteria for ratio in found.ratios]
    rows = []
    for layer in found.layers:
        by_head = {(point.criterion, point.ratio): point for point in layer.points}
        cells = [Cell(f"{point.top1:.2f}", point.top1) if (point := by_head.get(head)) else Cell("–") for head in heads]
        rows.append((Cell(layer.group), Cell(str(layer.stage), layer.stage), Cell(str(layer.size), layer.size), *cells))
    means = [Cell(f"{(mean := found.mean(*head)):.2f}", mean) for head in heads]
    rows.append((Cell("mean over layers"), Cell(""), Cell(""), *means))
    columns = ("Layer", "Stage", "Filters", *(f"{criterion} {ratio:.0%}" for criterion, ratio in heads))
    title = f"Top-1 with one layer pruned, no retraining; whole network {found.base['top1']:.2f} %"
    notes = (f"{found.images} images; " + "; ".join(f"{key}: {value}" for key, value in found.conditions.items()),)
    return Table("sensitivity", title, columns, tuple(rows), notes)


def write(found: Sensitivity, folder: Path) -> list[Path]:
    """Write curves (SVG, PNG), the table (CSV, Markdown) and the sweep itself (JSON) to a folder.

    **Returns:** the paths.
    """
    folder = Path(folder)
    table = sensitivity_table(found)
    paths = [folder / "sensitivity.json", folder / "sensitivity.csv", folder / "sensitivity.md"]
    found.write(paths[0])
    write_text(paths[1], table.csv())
    write_text(paths[2], table.markdown())
    for plot in sensitivity_plots(found):
        paths += [folder / f"{plot.name}.svg", folder / f"{plot.name}.png"]
        write_text(paths[-2], plot.file())
        _write_bytes(paths[-1], plot.png)
    return paths


def _layers(found: Sensitivity, criterion: str) -> Plot:
    ranked = sorted(found.layers, key=lambda layer: sum(point.top1 for point in layer.curve(criterion)))
    named = {layer.group for layer in ranked[:NAMED]}
    stages = sorted({layer.stage for layer in found.layers})
    with new_axes(3.6) as (figure, axes):
        shown = 0
        for layer in found.layers:
            colour = _colour(stages.index(layer.stage) / max(1, len(stages) - 1))
            xs, ys = _line(found, layer, criterion)
            if layer.group in named:
                shown += 1
                mark = "osD^v"[shown % 5]
                axes.plot(xs, ys, color=colour, marker=mark, markersize=4, label=label_text(layer.group))
            else:
                axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.7)
        axes.axhline(found.base["top1"], color=INK.light, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_xlabel("Filters pruned away, %")
        axes.set_ylabel("Top-1 without retraining, %")
        axes.set_xlim(0, 100)
        add_legend(figure, shown)
    caption = (
        f"Each layer pruned alone by {criterion}; colours run from the first stage (teal) to the last (violet); the "
        f"{len(named)} layers that lose most on average are named. Dashed: the whole network. {found.images} images."
    )
    return finish(f"sensitivity_{criterion}", f"Sensitivity of each layer, {criterion}", caption, figure)


def _means(found: Sensitivity) -> Plot:
    with new_axes(3.2) as (figure, axes):
        for index, criterion in enumerate(found.criteria):
            ys = [found.base["top1"], *(found.mean(criterion, ratio) for ratio in found.ratios)]
            colour = _colour(index / max(1, len(found.criteria) - 1))
            xs = [0.0, *(100 * ratio for ratio in found.ratios)]
            axes.plot(xs, ys, color=colour, marker="osD^vP*X"[index % 8], markersize=4, label=label_text(criterion))
        axes.axhline(found.base["top1"], color=MUTED.light, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_xlabel("Filters of one layer pruned away, %")
        axes.set_ylabel("Top-1, mean over layers, %")
        axes.set_xlim(0, 100)
        add_legend(figure, len(found.criteria))
    caption = "Mean over the layers, each pruned alone, without retraining."
    return finish("sensitivity_means", "Criteria compared", caption, figure)


def _line(found: Sensitivity, layer: Layer, criterion: str) -> tuple[Sequence[float], Sequence[float]]:
    curve = layer.curve(criterion)
    return [0.0, *(100 * point.ratio for point in curve)], [found.base["top1"], *(point.top1 for point in curve)]


def _colour(place: float) -> str:
    return oklch(0.62 - 0.2 * place, 0.12, 190 + 110 * place)


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
