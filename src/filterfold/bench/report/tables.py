"""Tables: what a report says in rows, apart from how it is shown (terminal, HTML, CSV, Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import stats
from . import cost_tables
from .format import MISSING, interval, mean_sd, number, p_value, points, signed, times
from .study import MEASURES, TESTED, Group, Measure, Record, Study, studies, value
from .table import Cell, Table, heading, p_cell
from .verdict import Judgement, control_tests, judge

HEADINGS = ("Method", "n", "Top-1 %", "Top-5 %", "Inference s", "MACs", "Parameters", "Training s")


@dataclass(frozen=True, slots=True)
class Row:
    """One group of the terminal's table: plain numbers, and `texts` to print under `HEADINGS`."""

    study: str
    label: str
    n: int
    failed: int
    top1: stats.Summary | None
    top5: stats.Summary | None
    inference_seconds: stats.Summary | None
    macs: stats.Summary | None
    parameters: stats.Summary | None
    train_seconds: stats.Summary | None
    texts: tuple[str, ...]


def summary(records: Iterable[Record], control: str = "dense") -> list[Row]:
    """The comparison table for the terminal, one row a group, control first.

    **Arguments:**

    - `records`: trial records; several models or data sets follow one another (`Row.study`).
    - `control`: method or label that leads the table.

    **Raises:** `RecordError` if there are no records.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "seed": 0, "result": {"top1": 90.0}}
    >>> [row] = summary([record, record | {"seed": 1, "result": {"top1": 91.0}}])
    >>> row.texts
    ('dense', '2', '90.50 ± 0.71', '–', '–', '–', '–', '–')
    """
    return [row for study in studies(records, control) for row in _summary(study)]


def _summary(study: Study) -> list[Row]:
    rows, measures = [], MEASURES
    failures = [str(record.get("label") or record.get("method")) for record in study.failed]
    for group in study.groups:
        a, b, c, d, e, f = [stats.summarise(v) if (v := group.values(m)) else None for m in measures]
        texts = (group.label, str(group.n), *(mean_sd(group.values(m), m) for m in measures))
        rows.append(Row(study.title, group.label, group.n, failures.count(group.label), a, b, c, d, e, f, texts))
    for label in dict.fromkeys(label for label in failures if label not in {g.label for g in study.groups}):
        texts = (label, "0", *(MISSING,) * len(measures))
        rows.append(Row(study.title, label, 0, failures.count(label), None, None, None, None, None, None, texts))
    return rows


def comparison(study: Study) -> Table:
    """Mean ± sd of every measure that any trial has, one row a group."""
    measures = [m for m in MEASURES if study.samples(m)]
    rows = []
    for group in study.groups:
        cells = [
            Cell(mean_sd(v, m), stats.summarise(v).mean if v else None) for m in measures for v in [group.values(m)]
        ]
        rows.append((Cell(group.label), Cell(str(group.n), group.n), *cells))
    columns = ("Method", "n", *(heading(m) for m in measures))
    note = "Mean ± standard deviation between trials. The CSV file holds the means in full."
    return Table("comparison", "Comparison", columns, tuple(rows), (note,), True)


def trials(study: Study) -> Table:
    """Every trial, as the document's Figures 4 and 5 have them."""
    measures = [m for m in MEASURES if study.samples(m)]
    clusters = any(group.clusters is not None for group in study.groups)
    rows = []
    for group in study.groups:
        for index, trial in enumerate(group.trials, 1):
            seed = trial.get("seed")
            cells = [Cell(group.label), Cell(str(index), index), Cell(MISSING if seed is None else str(seed), seed)]
            if clusters:
                cells.append(Cell(MISSING if group.clusters is None else str(group.clusters), group.clusters))
            cells += [Cell(number(x, m.kind), x) for m in measures for x in [value(trial, m.key)]]
            rows.append(tuple(cells))
    columns = ("Method", "Trial", "Seed", *(("Clusters",) if clusters else ()), *(heading(m) for m in measures))
    return Table("trials", "Every trial", columns, tuple(rows), (), True)


def kruskal_wallis(study: Study) -> Table:
    """Kruskal–Wallis over all groups, for each measure that the document tests."""
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for measure in TESTED:
        samples = study.samples(measure)
        if len(samples) < 2:
            continue
        found = stats.kruskal_wallis(samples)
        sizes = sorted(set(found.n))
        n = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        h = Cell(MISSING if found.statistic is None else f"{found.statistic:.3f}", found.statistic)
        rows.append((Cell(measure.title), Cell(str(len(samples))), Cell(n), h, Cell(p_value(found.p), found.p)))
        notes += found.notes
    columns = ("Measure", "Groups", "Trials a group", "H", "p")
    notes.append("A small p says that at least one group differs. A large p is no evidence that the groups are equal.")
    return Table("kruskal_wallis", "Kruskal–Wallis", columns, tuple(rows), tuple(dict.fromkeys(notes)))


def dunn(study: Study) -> Table | None:
    """Dunn's test of every group against the control: uncorrected, and Holm over all pairs."""
    measures = [m for m in TESTED if study.control in study.samples(m) and len(study.samples(m)) > 1]
    if not measures or study.control is None:
        return None
    tests = {m: (stats.dunn(study.samples(m), None), stats.dunn(study.samples(m), "holm")) for m in measures}
    rows = []
    for group in study.others:
        cells = [Cell(group.label)]
        for m in measures:
            known = group.label in study.samples(m)
            cells += [p_cell(test.p(study.control, group.label) if known else None) for test in tests[m]]
        rows.append(tuple(cells))
    columns = (
        "Against " + study.control,
        *(f"{m.title}: {what}" for m in measures for what in ("uncorrected", "Holm")),
    )
    pairs = len(study.groups) * (len(study.groups) - 1) // 2
    note = (
        f"Holm corrects over all {pairs} pairs of groups. Dunn pools ranks over all groups, so it is weak between "
        "neighbours."
    )
    return Table("dunn", "Dunn’s test against the control", columns, tuple(rows), (note,), True)


def dunn_pairs(study: Study, measure: Measure) -> Table:
    """All pairs of groups: Holm above the diagonal, uncorrected below."""
    samples = study.samples(measure)
    raw, corrected = stats.dunn(samples, None), stats.dunn(samples, "holm")
    names = list(samples)
    rows = tuple(
        (
            Cell(a),
            *(Cell("·") if i == j else p_cell((corrected if j > i else raw).p(a, b)) for j, b in enumerate(names)),
        )
        for i, a in enumerate(names)
    )
    title = f"Dunn’s test of all pairs: {measure.title.lower()}"
    return Table(
        f"dunn_{measure.key}",
        title,
        (measure.title, *names),
        rows,
        ("Above the diagonal: Holm. Below: uncorrected.",),
        True,
    )


def equivalence(judgements: Sequence[Judgement]) -> Table | None:
    """Top-1 against the control: difference, interval, non-inferiority and TOST."""
    found = [j for j in judgements if j.top1 and j.tost]
    if not found:
        return None
    control, margin = found[0].control.label, points(found[0].margin)
    rows = []
    for j in found:
        if j.top1 is None or j.tost is None:
            continue
        rows.append(
            (
                Cell(j.group.label),
                Cell(f"{j.group.n} / {j.control.n}" + (" paired" if j.paired else "")),
                Cell(signed(j.top1.value), j.top1.value),
                Cell(interval(j.tost.low, j.tost.high)),
                p_cell(j.tost.p_not_worse),
                p_cell(j.p_not_worse),
                p_cell(j.tost.p),
                Cell(j.accuracy),
            )
        )
    columns = (
        "Against " + control,
        "n",
        "Difference, points",
        "90 % interval",
        "No worse: p",
        "p, Holm",
        "Equivalent: p (TOST)",
        "Verdict",
    )
    notes = (
        f"Margin {margin}, fixed beforehand. “No worse” tests that the loss is under the margin (one-sided, "
        "Welch); "
        "“equivalent” that the difference is under it both ways. Holm over the methods.",
    )
    return Table("equivalence", f"No worse than {control} within {margin}?", columns, tuple(rows), notes, True)


def against_control(study: Study, measure: Measure) -> Table | None:
    """One measure against the control: difference or ratio, Cliff's δ, and permutation test with Holm."""
    tests = control_tests(study, measure)
    if not tests:
        return None
    rows, notes = [], []
    for test in tests:
        ours, theirs = test.samples
        effect = stats.cliffs_delta(ours, theirs)
        if measure.kind == "seconds" and min(*ours, *theirs) > 0:
            d = stats.mean_ratio(theirs, ours)
            bounds = MISSING if d.low is None else f"{times(d.low)} … {times(d.high)}"
            change = (Cell(times(d.value), d.value), Cell(bounds))
        else:
            d = stats.mean_difference(ours, theirs, paired=test.paired)
            change = (Cell(signed(d.value), d.value), Cell(interval(d.low, d.high)))
        delta = Cell(f"{signed(effect.delta)} {effect.size}", effect.delta)
        rows.append((Cell(test.group.label), *change, delta, p_cell(test.result.p), p_cell(test.p_adjusted)))
        notes += [*d.notes, *test.result.notes]
    what = "Speed-up" if measure.kind == "seconds" else "Difference"
    columns = (f"Against {study.control}", what, "95 % interval", "Cliff’s δ", "Permutation p", "p, Holm")
    title = f"{measure.title} against {study.control}"
    return Table(f"against_control_{measure.key}", title, columns, tuple(rows), tuple(dict.fromkeys(notes)), True)


def widths(study: Study) -> Table | None:
    """Width of every layer before the cut and, averaged over trials, after it."""
    groups = [group for group in study.groups if any(_widths(trial) for trial in group.trials)]
    layers = dict.fromkeys(name for group in groups for trial in group.trials for name in _widths(trial))
    cut = [group for group in groups if any(a != b for trial in group.trials for a, b in _widths(trial).values())]
    if not layers or not cut:
        return None
    rows = []
    for layer in layers:
        before = max(_widths(t)[layer][0] for g in groups for t in g.trials if layer in _widths(t))
        cells = [Cell(layer), Cell(str(before), before)]
        cells += [Cell(MISSING if w is None else f"{w:g}", w) for g in cut for w in [mean_width(g, layer)]]
        rows.append(tuple(cells))
    columns = ("Layer", "Before", *(group.label for group in cut))
    return Table("widths", "Width of every layer", columns, tuple(rows), ("Filters after the cut, mean over trials.",))


def mean_width(group: Group, layer: str) -> float | None:
    """The layer's width after the cut, averaged over the group's trials."""
    found = [_widths(trial)[layer][1] for trial in group.trials if layer in _widths(trial)]
    return round(sum(found) / len(found), 1) if found else None


def _widths(trial: Record) -> dict[str, list[int]]:
    return (trial.get("result") or {}).get("widths") or {}


def failed(study: Study) -> Table | None:
    """Trials that failed, with their reasons."""
    rows = [
        (
            Cell(str(r.get("label") or r.get("method"))),
            Cell(str(r.get("seed", MISSING))),
            Cell(str(r.get("reason") or "no reason recorded")),
        )
        for r in study.failed
    ]
    return Table("failed", "Failed trials", ("Method", "Seed", "Reason"), tuple(rows)) if rows else None


def provenance(study: Study) -> Table | None:
    """What the numbers were made with: each fact once, or every value that it had."""
    facts: dict[str, list[str]] = {}
    for trial in (*study.trials, *study.failed):
        for key, fact in _facts(trial):
            entry = facts.setdefault(key, [])
            if fact not in entry:
                entry.append(fact)
    seeds = [f"{g.label}: {', '.join(str(t.get('seed')) for t in g.trials)}" for g in study.groups]
    if not facts:
        return None
    rows = [(Cell(key), Cell("; ".join(found))) for key, found in facts.items()]
    rows.append((Cell("seeds"), Cell("; ".join(seeds))))
    dates = sorted(str(t[key]) for t in study.trials for key in ("started", "finished") if t.get(key))
    if dates:
        rows.append((Cell("run"), Cell(f"{dates[0]} to {dates[-1]}")))
    return Table("provenance", "Provenance", ("Fact", "Value"), tuple(rows))


def _facts(trial: Record) -> list[tuple[str, str]]:
    facts = []
    for key, fact in (trial.get("environment") or {}).items():
        if key == "packages" and isinstance(fact, dict):
            facts += [(str(name), str(version)) for name, version in fact.items()]
        elif fact is not None:
            facts.append(
                (str(key), {True: "yes", False: "no"}.get(fact, str(fact)) if isinstance(fact, bool) else str(fact))
            )
    facts += [(key, str(trial[key])) for key in ("command", "source") if trial.get(key)]
    for key, option in (trial.get("options") or {}).items():
        if key not in ("keep", "macs") and option not in (None, {}, []):
            facts.append((f"option {key}", _option(option)))
    return facts


def _option(option: object) -> str:
    if isinstance(option, dict):
        return ", ".join(f"{key} {entry}" for key, entry in option.items())
    return str(option)


def every(study: Study, margin: float = 0.5) -> list[Table]:
    """All tables that the study has material for."""
    judgements = judge(study, margin)
    several = [m for m in TESTED if len(study.samples(m)) > 1]
    candidates = [
        comparison(study),
        cost_tables.latency(study),
        cost_tables.training(study),
        trials(study),
        equivalence(judgements),
        *(against_control(study, m) for m in TESTED),
        kruskal_wallis(study) if several else None,
        dunn(study),
        *(dunn_pairs(study, m) for m in several),
        widths(study),
        cost_tables.wasted(study),
        failed(study),
        provenance(study),
    ]
    return [table for table in candidates if table is not None]
