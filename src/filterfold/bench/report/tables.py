"""Tables of what was measured, and of the tests on it."""

from __future__ import annotations

from collections.abc import Sequence

from .. import stats
from .format import MISSING, interval, number, points, ratio_interval, signed, times
from .study import COMPARED, TESTED, Group, Measure, Record, Study, label_of, value, widths_of
from .table import Cell, Table, cell, mean_cell, p_cell
from .verdict import Judgement, control_tests


def comparison(study: Study) -> Table:
    """Mean ± sd of every measure that any trial has, one row a group; last, the groups all of whose trials failed."""
    measures = [m for m in COMPARED if study.samples(m)]
    rows = [
        (cell(group.label), cell(group.n), *(mean_cell(group.values(m), m) for m in measures)) for group in study.groups
    ]
    lost = dict.fromkeys(map(label_of, study.failed)).keys() - {group.label for group in study.groups}
    rows += [(cell(label), cell(0), *(cell(None) for _ in measures)) for label in sorted(lost)]
    note = "Mean ± standard deviation between trials. The CSV file holds the means in full."
    columns = ("Method", "n", *(m.heading for m in measures))
    return Table("comparison", "Comparison", columns, tuple(rows), (note,), True)


def trials(study: Study) -> Table:
    """Every trial, as the document's Figures 4 and 5 have them."""
    measures = [m for m in COMPARED if study.samples(m)]
    clusters = any(group.clusters is not None for group in study.groups)
    rows = []
    for group in study.groups:
        for index, trial in enumerate(group.trials, 1):
            found = [(m, value(trial, m)) for m in measures]
            cells = [cell(group.label), cell(index), cell(trial.get("seed"))]
            cells += [cell(group.clusters)] if clusters else []
            rows.append((*cells, *(cell(x, number(x, m.kind)) for m, x in found)))
    columns = ("Method", "Trial", "Seed", *(("Clusters",) if clusters else ()), *(m.heading for m in measures))
    return Table("trials", "Every trial", columns, tuple(rows), (), True)


def equivalence(judgements: Sequence[Judgement]) -> Table | None:
    """Top-1 against the control: difference, interval, non-inferiority and TOST."""
    rows = []
    for j in judgements:
        if j.top1 and j.tost:
            n = f"{j.group.n} / {j.control.n}" + (" paired" if j.paired else "")
            difference, bounds = cell(j.top1.value, signed(j.top1.value)), Cell(interval(j.tost.low, j.tost.high))
            p = (p_cell(j.tost.p_not_worse), p_cell(j.p_not_worse), p_cell(j.tost.p))
            rows.append((cell(j.group.label), cell(n), difference, bounds, *p, cell(j.accuracy)))
    if not rows:
        return None
    control, margin = judgements[0].control.label, points(judgements[0].margin)
    heads = ("n", "Difference, points", "90 % interval", "No worse: p", "p, Holm", "Equivalent: p (TOST)", "Verdict")
    note = (
        f"Margin {margin}, fixed beforehand. “No worse” tests that the loss is under the margin (one-sided, Welch); "
        "“equivalent” that the difference is under it both ways. Holm over the methods."
    )
    title = f"No worse than {control} within {margin}?"
    return Table("equivalence", title, (f"Against {control}", *heads), tuple(rows), (note,), True)


def against_control(study: Study, measure: Measure) -> Table | None:
    """One measure against the control: difference or ratio, Cliff's δ, and permutation test with Holm."""
    rows, notes, seconds = [], [], measure.kind == "seconds"
    for test in control_tests(study, measure):
        ours, theirs, paired = test.samples.ours, test.samples.theirs, test.samples.paired
        effect = stats.cliffs_delta(ours, theirs)
        if seconds and min(*ours, *theirs) > 0:
            found = stats.mean_ratio(theirs, ours)
            change = (cell(found.value, times(found.value)), Cell(ratio_interval(found)))
        else:
            found = stats.mean_difference(ours, theirs, paired=paired)
            change = (cell(found.value, signed(found.value)), Cell(interval(found.low, found.high)))
        delta = cell(effect.delta, f"{signed(effect.delta)} {effect.size}")
        rows.append((cell(test.group.label), *change, delta, p_cell(test.result.p), p_cell(test.p_adjusted)))
        notes += [*found.notes, *test.result.notes]
    if not rows:
        return None
    heads = ("Speed-up" if seconds else "Difference", "95 % interval", "Cliff’s δ", "Permutation p", "p, Holm")
    title = f"{measure.title} against {study.control}"
    notes = list(dict.fromkeys(notes))
    columns = (f"Against {study.control}", *heads)
    return Table(f"against_control_{measure.key}", title, columns, tuple(rows), tuple(notes), True)


def kruskal_wallis(study: Study) -> Table | None:
    """Kruskal–Wallis over all groups, for each measure that the document tests."""
    rows: list[tuple[Cell, ...]] = []
    notes: dict[str, None] = {}
    for measure in TESTED:
        samples = study.samples(measure)
        if len(samples) < 2:
            continue
        found = stats.kruskal_wallis(samples)
        n = "–".join(dict.fromkeys((str(min(found.n)), str(max(found.n)))))
        h = cell(found.statistic, f"{found.statistic:.3f}")
        rows.append((cell(measure.title), cell(len(samples)), cell(n), h, p_cell(found.p)))
        notes |= dict.fromkeys(found.notes)
    note = "A small p says that at least one group differs. A large p is no evidence that the groups are equal."
    columns = ("Measure", "Groups", "Trials a group", "H", "p")
    return Table("kruskal_wallis", "Kruskal–Wallis", columns, tuple(rows), (*notes, note)) if rows else None


def dunn(study: Study) -> Table | None:
    """Dunn's test of every group against the control: uncorrected, and Holm over all pairs."""
    control = study.control
    samples = [(m, found) for m in TESTED if len(found := study.samples(m)) > 1 and control in found]
    if not samples or control is None:
        return None
    rows = []
    tests = [(found, test) for _, found in samples for test in (stats.dunn(found, None), stats.dunn(found, "holm"))]
    for group in study.others:
        p = [test.p(control, group.label) if group.label in found else None for found, test in tests]
        rows.append((cell(group.label), *map(p_cell, p)))
    heads = [f"{m.title}: {what}" for m, _ in samples for what in ("uncorrected", "Holm")]
    pairs = len(study.groups) * (len(study.groups) - 1) // 2
    note = (
        f"Holm corrects over all {pairs} pairs of groups. Dunn pools ranks over all groups, so it is weak between "
        "neighbours."
    )
    title = "Dunn’s test against the control"
    return Table("dunn", title, (f"Against {control}", *heads), tuple(rows), (note,), True)


def dunn_pairs(study: Study, measure: Measure) -> Table | None:
    """All pairs of groups: Holm above the diagonal, uncorrected below."""
    samples = study.samples(measure)
    if len(samples) < 2:
        return None
    raw, corrected = stats.dunn(samples, None), stats.dunn(samples, "holm")
    names = list(samples)
    rows = [
        [Cell("·") if i == j else p_cell((corrected if j > i else raw).p(a, b)) for j, b in enumerate(names)]
        for i, a in enumerate(names)
    ]
    title, note = f"Dunn’s test of all pairs: {measure.title.lower()}", "Above the diagonal: Holm. Below: uncorrected."
    named = tuple((cell(name), *row) for name, row in zip(names, rows, strict=True))
    return Table(f"dunn_{measure.key}", title, (measure.title, *names), named, (note,), True)


def widths(study: Study) -> Table | None:
    """Width of every layer before the cut and, averaged over trials, after it."""
    cut = cut_groups(study)
    rows = []
    for layer, before in widths_before(study).items():
        means = [mean_width(group, layer) for group in cut]
        rows.append((cell(layer), cell(before), *(cell(w, MISSING if w is None else f"{w:g}") for w in means)))
    if not rows or not cut:
        return None
    columns = ("Layer", "Before", *(group.label for group in cut))
    return Table("widths", "Width of every layer", columns, tuple(rows), ("Filters after the cut, mean over trials.",))


def cut_groups(study: Study) -> list[Group]:
    """The groups in which some layer became narrower."""
    return [g for g in study.groups if any(a != b for t in g.trials for a, b in widths_of(t).values())]


def widths_before(study: Study) -> dict[str, int]:
    """Layer → its width before the cut, in the order of the network."""
    found: dict[str, int] = {}
    for trial in study.trials:
        for layer, (before, _) in widths_of(trial).items():
            found[layer] = max(before, found.get(layer, 0))
    return found


def mean_width(group: Group, layer: str) -> float | None:
    """The layer's width after the cut, averaged over the group's trials."""
    found = [widths_of(trial)[layer][1] for trial in group.trials if layer in widths_of(trial)]
    return round(sum(found) / len(found), 1) if found else None


def failed(study: Study) -> Table | None:
    """Trials that failed, with their reasons."""
    rows = [
        (cell(label_of(r)), cell(r.get("seed")), cell(str(r.get("reason") or "no reason recorded")))
        for r in study.failed
    ]
    return Table("failed", "Failed trials", ("Method", "Seed", "Reason"), tuple(rows)) if rows else None


def provenance(study: Study) -> Table | None:
    """What the numbers were made with: each fact once, or every value that it had."""
    facts: dict[str, dict[str, None]] = {}
    for trial in (*study.trials, *study.failed):
        for key, fact in _facts(trial):
            facts.setdefault(key, {})[fact] = None
    if not facts:
        return None
    rows = [(cell(key), cell("; ".join(found))) for key, found in facts.items()]
    seeds = (f"{g.label}: {', '.join(str(t.get('seed')) for t in g.trials)}" for g in study.groups)
    rows.append((cell("seeds"), cell("; ".join(seeds))))
    dates = sorted(str(t[key]) for t in study.trials for key in ("started", "finished") if t.get(key))
    if dates:
        rows.append((cell("run"), cell(f"{dates[0]} to {dates[-1]}")))
    return Table("provenance", "Provenance", ("Fact", "Value"), tuple(rows))


def _facts(trial: Record) -> list[tuple[str, str]]:
    """Environment, command, source and options of a trial as texts."""
    environment = dict(trial.get("environment") or {})
    packages = environment.pop("packages", None) or {}
    facts = [(str(key), _text(fact)) for key, fact in environment.items() if fact is not None]
    facts += [(str(name), str(version)) for name, version in packages.items()]
    facts += [(key, str(trial[key])) for key in ("command", "source") if trial.get(key)]
    options = (trial.get("options") or {}).items()
    return facts + [
        (f"option {key}", _text(option))
        for key, option in options
        if key not in ("keep", "macs") and option not in (None, {}, [])
    ]


def _text(fact: object) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in fact.items())
    return str(fact)
