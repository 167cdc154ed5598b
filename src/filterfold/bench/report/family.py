"""The page of a family of children: accuracy and agreement against measured speed, and how to load each child."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...profiling.latency_results import CONTROL
from ...utils.io import write_text
from .. import stats
from ..family import UNCUT
from .build import PAGE, Section
from .figure import DASHED, MATPLOTLIB, METHODS, MUTED, PAPER, Plot, finish, new_axes, scale_axis
from .format import number, plural, signed, significant, times
from .table import Table, cell
from .template import render

MEASURES = (("top1", "top-1", METHODS[0], "o"), ("agreement", "agreement with the uncut network", METHODS[1], "D"))
"""Key in a record, what it is called, colour, mark."""


Loading = Callable[[Path], tuple[str, str]]
"""A child's file → lines of Python, and a command, that load it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One child in the page's list."""

    name: str
    badges: Sequence[tuple[str, str]]
    words: str
    python: str
    command: str


def build_family(family: Mapping[str, Any], folder: Path, loading: Loading, title: str) -> Path:
    """Write `report.html`, plots and tables of a family (what `bench.family.Family.make` returns) to a folder.

    **Arguments:** `loading`: how to load a child; `title`: the page's heading.

    **Returns:** the page's path.
    """
    import matplotlib

    with matplotlib.rc_context(MATPLOTLIB):
        plots = [_scatter(family, size) for size in _sizes(family)]
    sections = [
        Section("Accuracy against speed", plots),
        Section("Comparison", (), [comparison(family)]),
        Section("Time of calls", (), [_latency(family)]),
        Section("Provenance", (), [_provenance(family)], prose=True),
    ]
    for section in sections:
        for table in section.tables:
            table.write(folder / "tables")
        for plot in section.plots:
            plot.write(folder / "plots")
    images, known = family["uncut"]["images"], family["timing"]["conditions"]
    place = f"{known['device']}, {plural(known['threads'], 'thread')}"
    text = render(
        "family.html.j2",
        kind="family of children",
        title=title,
        facts=[plural(len(family["children"]), "child", "children"), f"{images:,} test images", place],
        headline=_headline(family),
        warnings=family["timing"]["warnings"],
        entries=list(_entries(family, folder, loading)),
        sections=sections,
    )
    page = folder / PAGE
    write_text(page, text)
    return page


def comparison(family: Mapping[str, Any]) -> Table:
    """One row a network: work, accuracy, agreement, and the speed-up at each batch size beside the ratio of MACs."""
    sizes, rows = _sizes(family), []
    for name, record in _networks(family):
        timed = [_row(family, name, size) for size in sizes]
        cells = [cell(record[key], number(record[key], "count")) for key in ("macs", "parameters")]
        cells += [cell(record[key], number(record[key], "percent")) for key, *_ in MEASURES]
        cells += [cell(row["speedup"], times(row["speedup"])) for row in timed]
        cells.append(cell(timed[0]["macs_ratio"], times(timed[0]["macs_ratio"])))
        rows.append((cell(name), *cells))
    speeds = [f"Speed-up, batch {size}" for size in sizes]
    columns = ("Share of the MACs", "MACs", "Parameters", "Top-1, %", "Agreement, %", *speeds, "MACs ratio")
    note = "Agreement: share of the test images to which a network gives the class that the uncut one gives."
    return Table("comparison", "Comparison", columns, tuple(rows), (note,))


def _scatter(family: Mapping[str, Any], size: int) -> Plot:
    """Top-1 and agreement against the measured speed-up, with 95 % intervals."""
    axes = new_axes(3.5, f"Speed-up over the uncut network at batch {size}", "% of the test images")
    axes.axvline(1, color=MUTED.light, linewidth=0.8, linestyle=DASHED, zorder=1)
    every: list[float] = []
    for key, words, colour, marker in MEASURES:
        points = []
        for name, record in _networks(family):
            row = _row(family, name, size)
            x, y, ends = row["speedup"], record[key], row["speedup_interval"]
            low, high = stats.proportion_interval(y / 100, record["images"])
            bars = {"xerr": [[x - ends[0]], [ends[1] - x]], "yerr": [[y - 100 * low], [100 * high - y]]}
            mark: dict[str, Any] = {"fmt": marker, "markersize": 6, "markeredgecolor": PAPER.light, "elinewidth": 0.9}
            axes.errorbar(x, y, **bars, **mark, color=colour.light)
            if key == MEASURES[-1][0]:
                beside: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(name, (x, y), **beside)
            points.append((x, y))
            every.append(x)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour.light, linewidth=1)
        axes.plot([], [], marker, color=colour.light, markersize=6, markeredgewidth=0, label=words)
    scale_axis(axes, "x", every, lambda x: f"{x:.3g}×", 4)
    control = _row(family, CONTROL, size)["speedup"]
    caption = (
        "Each point is a network, named by its share of the multiply-accumulates. Right: faster. Bars: 95 % intervals, "
        "of the median ratio of times and of the share of images (Wilson). All were timed in turn in one process; the "
        f"A/A control, the uncut network once more, gives {times(control)}."
    )
    return finish(f"accuracy_speedup_{size}", f"Accuracy against measured speed-up, batch {size}", caption, axes)


def _latency(family: Mapping[str, Any]) -> Table:
    rows = []
    for row in family["timing"]["rows"]:
        low, high = row["speedup_interval"]
        call, p90 = 1e3 * row["median"], 1e3 * row["p90"]
        cells = [cell(row["speedup"], times(row["speedup"])), cell(f"{times(low)}\u00a0…\u00a0{times(high)}")]
        cells += [cell(row["macs_ratio"], times(row["macs_ratio"]))]
        cells += [cell(call, significant(call, 3)), cell(p90, significant(p90, 3))]
        rows.append((cell(row["model"]), cell(row["batch_size"]), *cells, cell(f"{row['throughput']:,.0f}")))
    columns = (
        "Network",
        "Batch",
        "Speed-up",
        "95 % interval",
        "Ratio of MACs",
        "Call, ms",
        "p90, ms",
        "Images a second",
    )
    conditions = "; ".join(f"{key}: {value}" for key, value in family["timing"]["conditions"].items())
    return Table("latency", "Time of calls", columns, tuple(rows), (conditions,))


def _provenance(family: Mapping[str, Any]) -> Table:
    rows = [*family["settings"].items(), *family["timing"]["environment"].items()]
    shown = [(cell(key), cell(_plain(value))) for key, value in rows if value not in (None, {}, [], "")]
    return Table("provenance", "Provenance", ("What", "Value"), tuple(shown))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _headline(family: Mapping[str, Any]) -> str:
    """What the smallest child is worth."""
    child, uncut, size = family["children"][-1], family["uncut"], _sizes(family)[0]
    row, control = _row(family, child["name"], size), _row(family, CONTROL, size)
    return (
        f"With {100 * child['macs'] / uncut['macs']:.0f} % of the multiply-accumulates the smallest child is "
        f"{times(row['speedup'])} as fast at batch {size} (A/A control {times(control['speedup'])}). Its top-1 is "
        f"{child['top1']:.2f} % ({signed(child['top1'] - uncut['top1'])} points); it gives the uncut network’s class "
        f"on {child['agreement']:.2f} % of the images."
    )


def _entries(family: Mapping[str, Any], folder: Path, loading: Loading) -> Iterator[_Entry]:
    uncut = family["uncut"]
    for child in family["children"]:
        timed = [(size, _row(family, child["name"], size)) for size in _sizes(family)]
        badges = [("quiet", f"{times(row['speedup'])}, batch {size}") for size, row in timed]
        badges.append(("quiet", f"top-1 {signed(child['top1'] - uncut['top1'])}"))
        badges.append(("quiet", f"agreement {child['agreement']:.1f} %"))
        words = ", ".join(
            f"{number(child[key], 'count')} {noun} ({100 * child[key] / uncut[key]:.1f} %)"
            for key, noun in (("macs", "MACs"), ("parameters", "parameters"))
        )
        if trained := child.get("training"):
            words += f"; {trained['epochs']} epochs of training, from {child['before_training']['top1']:.2f} % top-1"
        python, command = loading(folder / f"macs-{child['name']}.safetensors")
        yield _Entry(child["name"], badges, f"{words}.", python, command)


def _sizes(family: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["batch_size"] for row in family["timing"]["rows"]))


def _networks(family: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(UNCUT, family["uncut"]), *((child["name"], child) for child in family["children"])]


def _row(family: Mapping[str, Any], name: str, size: int) -> Mapping[str, Any]:
    """The times of a network at a batch size."""
    rows = (row for row in family["timing"]["rows"] if (row["model"], row["batch_size"]) == (name, size))
    found: Mapping[str, Any] = next(rows)
    return found
