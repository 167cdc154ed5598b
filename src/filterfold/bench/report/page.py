"""The page: one HTML file with everything in it: no network, no script, light and dark, screen and paper.

Everything that comes from a record is escaped by `text`; the only markup that is passed through is
that of the plots, which Matplotlib escapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from . import cost_tables, tables
from .figure import Look, Plot, variables
from .format import plain, points, signed, times
from .study import MEASURES, SECONDS, TESTED, TOP1, TOP5, Study
from .table import Table
from .verdict import Judgement, accuracy_words, headline, pace_words
from .warnings import Reading

_TALL = 14
"""Rows from which a table scrolls within its own height."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One study with everything that was made of it."""

    study: Study
    looks: Mapping[str, Look]
    judgements: Sequence[Judgement]
    readings: Sequence[Reading]
    plots: Sequence[Plot]
    margin: float


def text(value: object) -> str:
    """Any value, escaped for HTML text and attributes.

    >>> text('<b> & "x"')
    '&lt;b&gt; &amp; &quot;x&quot;'
    """
    return escape(str(value), quote=True)


def render(chapters: Sequence[Chapter], title: str, version: str) -> str:
    """The whole page."""
    css = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    several = len(chapters) > 1
    parts = [_sections(chapter, index) for index, chapter in enumerate(chapters)]
    body = "\n".join(_chapter(c, part, i, several) for i, (c, part) in enumerate(zip(chapters, parts, strict=True)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)} · Filterfold</title>
<style>
{css}{_colours(chapters)}</style>
</head>
<body>
{_header(chapters, [name for name, _ in parts[0]], title)}
<main>
{body}
</main>
<footer>
<p>Written by Filterfold {text(version)}. The tables lie beside this page as CSV and Markdown (<code>tables/</code>),
the plots as SVG and PNG (<code>plots/</code>). ± is the standard deviation between trials; intervals are those of
Student’s and Welch’s t; p-values are two-sided unless a margin is involved.</p>
</footer>
</body>
</html>
"""


def _colours(chapters: Sequence[Chapter]) -> str:
    light = "\n".join(f"#study-{i} {{ {variables(c.looks, 'light')} }}" for i, c in enumerate(chapters))
    dark = "\n".join(f"#study-{i} {{ {variables(c.looks, 'dark')} }}" for i, c in enumerate(chapters))
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _header(chapters: Sequence[Chapter], sections: Sequence[str], title: str) -> str:
    trials = sum(len(c.study.trials) for c in chapters)
    failed = sum(len(c.study.failed) for c in chapters)
    facts = [_plural(trials, "trial") + (f", {failed} failed" if failed else "")]
    facts.append(_plural(sum(len(c.study.groups) for c in chapters), "setting"))
    controls = dict.fromkeys(c.study.control for c in chapters if c.study.control)
    if controls:
        facts.append(f"control: {', '.join(controls)}")
        facts.append(f"margin: {points(chapters[0].margin)} of top-1")
    spans = "".join(f"<span>{text(fact)}</span>" for fact in facts)
    links = "".join(f'<a href="#{_id(0, name)}">{name}</a>' for name in sections)
    if len(chapters) > 1:
        links = "".join(f'<a href="#study-{i}">{text(c.study.title or "table")}</a>' for i, c in enumerate(chapters))
    return f"""<header>
<p class="over">Filterfold · comparison</p>
<h1>{text(title)}</h1>
<div class="facts">{spans}</div>
<nav aria-label="Sections">{links}</nav>
</header>"""


def _chapter(chapter: Chapter, sections: Sequence[tuple[str, str]], index: int, titled: bool) -> str:
    heading = f"<h2>{text(chapter.study.title)}</h2>\n" if titled else ""
    parts = [f'<section id="{_id(index, name)}">\n<h2>{name}</h2>\n{content}\n</section>' for name, content in sections]
    return f'<div class="study" id="study-{index}">\n{heading}' + "\n".join(parts) + "\n</div>"


def _sections(chapter: Chapter, index: int) -> list[tuple[str, str]]:
    """Names and contents of the sections that have any."""
    study = chapter.study
    found = [
        ("Verdict", _verdict(chapter, index)),
        ("What follows, and what does not", _readings(chapter.readings)),
        ("Comparison", _tables(chapter, [tables.comparison(study)]) if study.groups else ""),
        ("Speed", _speed(chapter, index)),
        ("Training cost", _training(chapter, index)),
        ("Tests", _tests(chapter)),
        ("While training", _plots(chapter, index, "curve_validation_top1", "curve_train_loss", "curve_macs")),
        ("Widths", _widths(chapter, index)),
        ("Clusters", _plots(chapter, index, "clusters_cosine", "clusters_changed")),
        ("Every trial", _trials(chapter, index)),
        ("Failed trials", _tables(chapter, [tables.failed(study)], prose=True)),
        ("Provenance", _tables(chapter, [tables.provenance(study)], prose=True)),
    ]
    return [(name, content) for name, content in found if content]


def _verdict(chapter: Chapter, index: int) -> str:
    suspects = {label for reading in chapter.readings for label in reading.suspects}
    words = headline(chapter.study, chapter.judgements)
    if suspects:
        words += " But the speed-up itself is suspect: see below."
    lead = f'<p class="headline">{text(words)}</p>'
    rows = "\n".join(
        _verdict_row(j, chapter.looks[j.group.label], j.group.label in suspects) for j in chapter.judgements
    )
    listing = f'<ul class="verdicts">\n{rows}\n</ul>' if rows else ""
    plot = _plots(chapter, index, "difference")
    return "\n".join(part for part in (lead, listing, f'<div class="gap">{plot}</div>' if plot else "") if part)


def _verdict_row(j: Judgement, look: Look, suspect: bool) -> str:
    n = f"n = {j.group.n} against {j.control.n}" + (", paired" if j.paired else "")
    words = f"{pace_words(j)}; {accuracy_words(j)}."
    return (
        f"<li><div><strong>{_dot(look)}<span>{text(j.group.label)}</span></strong>"
        f'<span class="n">{text(n)}</span></div>'
        f'<div><div class="badges">{"".join(_badges(j, suspect))}</div>'
        f'<p class="words">{text(words[0].upper() + words[1:])}</p></div></li>'
    )


def _badges(j: Judgement, suspect: bool) -> Iterable[str]:
    if j.speedup:
        ratio = times(j.speedup.value)
        kinds = {"faster": ("good", f"{ratio} faster"), "slower": ("bad", f"slower, {ratio}")}
        kind, words = kinds.get(j.pace, ("open", "faster: not shown"))
        yield _badge("open" if suspect else kind, words + (", suspect" if suspect else ""))
    if j.top1:
        change = signed(j.top1.value)
        margin = plain(j.margin)
        kind, words = {
            "better": ("good", f"accuracy better, {change}"),
            "no worse": ("good", f"accuracy no worse within {margin}"),
            "lower within the margin": ("good", f"accuracy {change}, within {margin}"),
            "worse": ("bad", f"accuracy worse, {change}"),
        }.get(j.accuracy, ("open", "accuracy kept: not shown"))
        yield _badge(kind, words)
    if j.macs_ratio and j.macs_ratio > 1.005:
        yield _badge("quiet", f"{times(j.macs_ratio)} fewer MACs")


def _badge(kind: str, words: str) -> str:
    return f'<span class="badge {kind}">{text(words)}</span>'


def _dot(look: Look) -> str:
    return f'<span class="dot" style="background:var(--{look.colour.name})"></span>'


def _readings(found: Sequence[Reading]) -> str:
    parts = [
        f'<div class="reading{" warning" if reading.warning else ""}">'
        f"<h3>{text(reading.title)}</h3><p>{text(reading.text)}</p></div>"
        for reading in found
    ]
    return f'<div class="readings">{"".join(parts)}</div>' if parts else ""


def _speed(chapter: Chapter, index: int) -> str:
    names = [plot.name for plot in chapter.plots if plot.name.startswith("accuracy_speedup")]
    plots = _plots(chapter, index, "accuracy_macs", "accuracy_time", *names, "speedups")
    return _spaced(plots, _tables(chapter, [cost_tables.latency(chapter.study)], titled=True))


def _training(chapter: Chapter, index: int) -> str:
    plots = _plots(chapter, index, "accuracy_training", "accuracy_training_macs")
    return _spaced(plots, _tables(chapter, [cost_tables.training(chapter.study)]))


def _widths(chapter: Chapter, index: int) -> str:
    shown, wasted = tables.widths(chapter.study), cost_tables.wasted(chapter.study)
    folded = _tables(chapter, [wasted], prose=True)
    folded = f"<details><summary>Widths that save nothing</summary>{folded}</details>" if folded else ""
    return _spaced(_plots(chapter, index, "widths"), _tables(chapter, [shown])) + folded


def _spaced(plots: str, table: str) -> str:
    return f'{plots}<div class="gap">{table}</div>' if plots and table else plots + table


def _tests(chapter: Chapter) -> str:
    study = chapter.study
    several = [m for m in TESTED if len(study.samples(m)) > 1]
    if not several:
        return ""
    main = [tables.equivalence(chapter.judgements), *(tables.against_control(study, m) for m in (SECONDS, TOP1, TOP5))]
    main += [tables.kruskal_wallis(study), tables.dunn(study)]
    pairs = _tables(chapter, [tables.dunn_pairs(study, m) for m in several])
    return _tables(chapter, main) + f"<details><summary>Dunn’s test of all pairs</summary>{pairs}</details>"


def _trials(chapter: Chapter, index: int) -> str:
    if not chapter.study.trials:
        return ""
    plots = _plots(chapter, index, *(f"trials_{m.key}" for m in MEASURES))
    return _spaced(plots, _tables(chapter, [tables.trials(chapter.study)]))


def _plots(chapter: Chapter, index: int, *names: str) -> str:
    parts = [
        f'<figure><figcaption class="title">{text(plot.title)}</figcaption>'
        f'<div role="img" aria-label="{text(plot.title)}. {text(plot.caption)}">'
        f"{plot.inline(chapter.looks, f's{index}-')}</div>"
        f"<p>{text(plot.caption)}</p></figure>"
        for name in names
        for plot in chapter.plots
        if plot.name == name
    ]
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _tables(chapter: Chapter, found: Iterable[Table | None], prose: bool = False, titled: bool = False) -> str:
    shown = [table for table in found if table is not None]
    return "".join(_table(table, chapter.looks, prose, titled=titled or len(shown) > 1) for table in shown)


def _table(table: Table, looks: Mapping[str, Look], prose: bool, titled: bool) -> str:
    head = "".join(f'<th scope="col">{_column(name, looks)}</th>' for name in table.columns)
    rows = []
    for first, *rest in table.rows:
        look = looks.get(first.text) if table.group_column else None
        cells = "".join(f"<td>{text(cell.text)}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{_dot(look) if look else ""}{text(first.text)}</th>{cells}</tr>')
    notes = "".join(f'<p class="note">{text(note[:1].upper() + note[1:])}</p>' for note in table.notes)
    heading = f"<h3>{text(table.title)}</h3>" if titled else ""
    kind = ("scroll prose" if prose else "scroll") + (" tall" if len(table.rows) > _TALL else "")
    return (
        f'<div class="table">{heading}'
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{text(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}</div>\n"
    )


def _column(name: str, looks: Mapping[str, Look]) -> str:
    return (_dot(looks[name]) if name in looks else "") + text(name)


def _id(index: int, name: str) -> str:
    return f"s{index}-" + "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
