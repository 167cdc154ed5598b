"""From records to a folder with the page, its plots and its tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ...errors import ConfigError
from ...utils.io import check_output, write_text
from ...utils.progress import track
from . import costs, tables
from .figure import Plot, Style, group_styles
from .format import mean_sd, plural, points, signed, times
from .plots import all_plots
from .study import COMPARED, TESTED, TOP1, Group, Record, Study, studies
from .table import Table
from .template import render
from .verdict import Judgement, accuracy_words, call_words, headline, judge, pace_words, power_words, sentence
from .warnings import StudyWarning, find_warnings

PAGE = "report.html"

_log = logging.getLogger("filterfold.bench.report")


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page; `folded` tables are hidden until the reader opens them."""

    title: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    folded_title: str = ""
    prose: bool = False

    @property
    def id(self) -> str:
        """The anchor within its chapter."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True, slots=True)
class Chapter:
    """One study with everything that the page shows of it; `prefix` keeps its anchors apart from other studies'."""

    study: Study
    prefix: str
    styles: Mapping[str, Style]
    judgements: Sequence[Judgement]
    warnings: Sequence[StudyWarning]
    sections: Sequence[Section]

    @property
    def suspects(self) -> set[str]:
        """Labels of the groups whose speed-up is in doubt."""
        return {label for warning in self.warnings for label in warning.suspects}

    @property
    def headline(self) -> str:
        """The verdict in one or two sentences."""
        words = headline(self.study, self.judgements)
        return f"{words} But the speed-up itself is suspect: see below." if self.suspects else words


def build(
    records: Iterable[Record],
    folder: Path,
    *,
    margin: float = 0.5,
    control: str = "dense",
    title: str | None = None,
) -> Path:
    """Write the report on `records` to `folder`.

    **Arguments:**

    - `records`: trial records (the schema is that of `filterfold.bench.trials`), finished and failed; `read_table`
      makes them from a CSV table.
    - `folder`: made if it is not there; gets `report.html`, `plots/` (SVG and PNG) and `tables/` (CSV
      and Markdown). Each file is written atomically, the page last; an older report is replaced.
    - `margin`: the largest loss of top-1, in points, that counts as "no worse"; fixed beforehand.
    - `control`: method or label that all others are compared with.
    - `title`: the page's heading; model and data set by default.

    **Returns:** the page's path.

    **Raises:** `RecordError` if there are no records, `ConfigError` for a margin that is not above 0, `OutputError` if
    the folder can't be written.
    """
    if not margin > 0:
        raise ConfigError(f"margin is {margin}; it must be above 0, in points of top-1 (default 0.5)")
    folder, found = Path(folder), studies(records, control)
    check_output(folder, folder=True)
    numbered = track(list(enumerate(found)), "Drawing the report", len(found))
    chapters = [_chapter(study, f"s{i}-", margin) for i, study in numbered]
    for i, chapter in enumerate(chapters, 1):
        name = re.sub(r"[^A-Za-z0-9]+", "-", chapter.study.title).strip("-")
        prefix = f"{i}-{name}-" if len(chapters) > 1 else ""  # keeps the files of several studies apart
        for section in chapter.sections:
            for table in (*section.tables, *section.folded):
                table.write(folder / "tables", prefix)
            for plot in section.plots:
                plot.write(folder / "plots", prefix)
    heading = title or "; ".join(study.title for study in found if study.title) or "Comparison of trials"
    page = folder / PAGE
    facts = list(_facts(chapters, margin))
    text = render(
        "page.html.j2",
        networks=lambda group: list(_networks(group, folder)),
        kind="comparison",
        title=heading,
        facts=facts,
        chapters=chapters,
        badges=_badges,
        words=_words,
    )
    write_text(page, text)
    _log.info("report on %d studies written to %s", len(found), page)
    return page


def verdict(records: Iterable[Record], *, margin: float = 0.5, control: str = "dense") -> list[str]:
    """The verdict in sentences, as the terminal prints it: the headline, each method, what n can show, warnings.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "result": {"top1": 90.0}}
    >>> verdict([record | {"seed": 0}, record | {"seed": 1}])
    ['Only dense has finished trials: there is nothing to compare with it yet.']
    """
    lines = []
    found = studies(records, control)
    for study in found:
        judgements = judge(study, margin)
        lead = f"{study.title}: " if len(found) > 1 else ""
        lines.append(lead + headline(study, judgements))
        lines += [sentence(judgement) for judgement in judgements]
        lines += [words] if (words := power_words(judgements)) else []
        lines += [f"Warning: {one.title}." for one in find_warnings(study, judgements) if not one.note]
    return lines


BRIEF = 5
"""Settings and failures that `brief` names."""


def brief(records: Iterable[Record], *, margin: float = 0.5, control: str = "dense") -> list[str]:
    """The verdict in about ten lines, as the terminal prints it: the winner, a line a setting, titles of warnings.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "result": {"top1": 90.0}}
    >>> brief([record | {"seed": 0}, record | {"seed": 1}])[1]
    'dense (n = 2): top-1 90.00 %'
    """
    lines = []
    found = studies(records, control)
    for study in found:
        judgements = judge(study, margin)
        lines.append((f"{study.title}: " if study.title else "") + headline(study, judgements))
        shown = [_row(group, None) for group in study.groups if group.label == study.control or not judgements]
        shown += [_row(j.group, j) for j in judgements]
        lines += shown[: BRIEF + 1]
        if len(shown) > BRIEF + 1:
            lines.append(f"and {plural(len(shown) - BRIEF - 1, 'more setting')}, on the page")
        if warnings := [one.title for one in find_warnings(study, judgements) if not one.note]:
            lines.append(f"Warnings, explained on the page: {'; '.join(warnings)}.")
        failed = [f"failed: {one.get('label')} seed {one.get('seed')}: {one.get('reason')}" for one in study.failed]
        lines += failed[:BRIEF] + ([f"and {len(failed) - BRIEF} more failed"] if len(failed) > BRIEF else [])
    return lines


def _row(group: Group, j: Judgement | None) -> str:
    """One setting: its accuracy, what may be said of it, and its speed."""
    parts = [f"top-1 {mean_sd(group.values(TOP1), TOP1)} %"] if group.values(TOP1) else []
    if j is not None and j.top1:
        parts[0] += f" ({'can’t tell' if j.accuracy == 'not shown' else j.accuracy})"
    if j is not None and j.speedup:
        unsure = " (can’t tell)" if j.pace == "not shown" else ""
        parts.append(f"{times(j.speedup.value)} as fast{unsure}{call_words(j)}")
    return f"{group.label} (n = {group.n}): {'; '.join(parts) or 'nothing measured'}"


def _chapter(study: Study, prefix: str, margin: float) -> Chapter:
    styles, judgements = group_styles(study), judge(study, margin)
    drawn = {plot.name: plot for plot in all_plots(study, styles, judgements)}

    def plots(*names: str) -> list[Plot]:
        return [plot for name in names for key, plot in drawn.items() if re.fullmatch(name, key)]

    def some(*candidates: Table | None) -> list[Table]:
        return [table for table in candidates if table is not None]

    warnings = find_warnings(study, judgements)
    tests = some(tables.equivalence(judgements), *(tables.against_control(study, measure) for measure in TESTED))
    tests += some(tables.kruskal_wallis(study), tables.dunn(study))
    pairs = some(*(tables.dunn_pairs(study, measure) for measure in TESTED))
    wasted = some(costs.wasted(study))
    speed = plots("accuracy_macs", "accuracy_time", r"accuracy_speedup_\d+", "speedups", "accuracy_shares")
    trials = plots(*(f"trials_{measure.key}" for measure in COMPARED))
    sections = [
        Section("Verdict", plots("difference")),
        Section("Warnings"),
        Section("Comparison", (), [tables.comparison(study)]),
        Section("Speed", speed, folded=some(costs.latency(study)), folded_title="Latency at every batch size"),
        Section("Length of training", plots("crossover")),
        Section(
            "Training cost",
            plots("accuracy_training", "accuracy_training_macs"),
            folded=some(costs.training(study)),
            folded_title="What training takes",
        ),
        Section("Tests", folded=[*tests, *pairs], folded_title="Intervals, effect sizes and p-values of every test"),
        Section("While training", plots("curve_validation_top1", "curve_train_loss", "curve_macs")),
        Section(
            "Widths",
            plots("widths"),
            folded=[*some(tables.widths(study)), *wasted],
            folded_title="Width of every layer, and widths that save nothing",
        ),
        Section("Clusters", plots("clusters_cosine", "clusters_changed")),
        Section(
            "Every trial", trials, folded=[tables.trials(study)] if study.trials else [], folded_title="Every trial"
        ),
        Section("Failed trials", (), some(tables.failed(study)), prose=True),
        Section("Provenance", folded=some(tables.provenance(study)), folded_title="What it was made with", prose=True),
    ]
    filled = [
        s
        for s in sections
        if s.id == "verdict" or (warnings if s.id == "warnings" else s.plots or s.tables or s.folded)
    ]
    return Chapter(study, prefix, styles, judgements, warnings, filled)


def _facts(chapters: Sequence[Chapter], margin: float) -> Iterator[str]:
    """What the header says: how many trials and settings, the control, the margin."""
    trials, failed, settings = (
        sum(len(getattr(c.study, name)) for c in chapters) for name in ("trials", "failed", "groups")
    )
    yield plural(trials, "trial") + (f", {failed} failed" if failed else "")
    yield plural(settings, "setting")
    controls = dict.fromkeys(c.study.control for c in chapters if c.study.control)
    if controls:
        yield f"control: {', '.join(controls)}"
        yield f"margin: {points(margin)} of top-1"


def _networks(group: Group, folder: Path) -> Iterator[tuple[str, str]]:
    """Seed and address of each of a group's networks that lie beside the page."""
    for trial in group.trials:
        address = f"models/{trial.get('id')}.safetensors"
        if (folder / address).is_file():
            yield str(trial.get("seed")), quote(address)


def _words(j: Judgement) -> str:
    """The verdict on a method as a sentence."""
    words = f"{pace_words(j)}; {accuracy_words(j)}."
    return words[0].upper() + words[1:]


def _badges(j: Judgement, suspect: bool) -> Iterator[tuple[str, str]]:
    """Kind (a CSS class) and text of a method's badges."""
    if j.speedup:
        ratio = times(j.speedup.value)
        calls = call_words(j).removeprefix(", ")
        note = f" ({calls})" if calls else ""
        kinds = {"faster": ("good", f"{ratio} faster{note}"), "slower": ("bad", f"slower, {ratio}{note}")}
        kind, words = kinds.get(j.pace, ("open", "speed: can’t tell"))
        yield ("open", f"{words}, suspect") if suspect else (kind, words)
    if j.top1:
        change = signed(j.top1.value)
        yield {
            "better": ("good", f"accuracy better, {change}"),
            "no worse": ("good", f"accuracy no worse within {j.margin:g}"),
            "lower within the margin": ("good", f"accuracy {change}, within {j.margin:g}"),
            "worse": ("bad", f"accuracy worse, {change}"),
        }.get(j.accuracy, ("open", "accuracy: can’t tell"))
    if j.macs_ratio and j.macs_ratio > 1.005:
        yield "quiet", f"{times(j.macs_ratio)} fewer MACs"
