"""Warnings: known mistakes in comparing pruning methods, found in a study by rules.

Each rule looks at a study and gives nothing, or a paragraph with the study's figures in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import stats
from .costs import speeds, wasted_by_label
from .format import number, p_words, points, signed, times
from .study import MACS, SECONDS, TESTED, TOP1, Study
from .verdict import ALPHA, Judgement, control_tests, power_words

AA_TOLERANCE = 0.03
"""An A/A control further than this from 1.00 is worth a warning (`profiling.latency_results` has the same)."""


@dataclass(frozen=True, slots=True)
class StudyWarning:
    """A title and a paragraph; a `note` only informs; `suspects` are the groups whose speed-up it casts doubt on."""

    title: str
    text: str
    note: bool = False
    suspects: tuple[str, ...] = ()


def find_warnings(study: Study, judgements: Sequence[Judgement]) -> list[StudyWarning]:
    """All warnings and notes on a study, the most important first."""
    return [
        *_faster_than_saved_work(judgements),
        *_calls_faster_than_saved_work(study),
        *_speedup_at_any_width(study, judgements),
        *_dunn(study),
        *_no_difference_is_not_equality(study, judgements),
        *_pooled(study),
        *_power(judgements),
        *_tests_disagree(study, judgements),
        *_timing(study),
        *_unsteady_timing(study),
        *_wasted(study),
        *_provenance(study),
    ]


def _faster_than_saved_work(judgements: Sequence[Judgement]) -> Iterator[StudyWarning]:
    found = [j for j in judgements if j.suspicious and j.speedup]
    cases = ", ".join(f"{j.group.label} {_ratio(j.speedup)} at {times(j.macs_ratio)}" for j in found)
    text = (
        f"The measured speed-up exceeds the ratio of multiply-accumulates: {cases} fewer MACs. Work that was not "
        "removed can’t be saved: look for a difference in how the two sides were timed before believing it."
    )
    if found:
        suspects = tuple(j.group.label for j in found)
        yield StudyWarning("Faster than the saved work explains", text, suspects=suspects)


def _calls_faster_than_saved_work(study: Study) -> Iterator[StudyWarning]:
    found = [speed for speed in speeds(study) if speed.exceeds_saved_work]
    cases = "; ".join(f"{s.group.label} at batch {s.size}: {_ratio(s.ratio)} at {times(s.macs_ratio)}" for s in found)
    text = (
        f"The measured speed-up of calls exceeds the ratio of multiply-accumulates: {cases} fewer MACs. A network that "
        "fits into a cache where the other does not can do that; else look for a difference in how the two were timed."
    )
    if found:
        yield StudyWarning("Calls faster than the saved work explains", text)


def _ratio(found: stats.Difference | None) -> str:
    return times(found.value if found else None)


def _speedup_at_any_width(study: Study, judgements: Sequence[Judgement]) -> Iterator[StudyWarning]:
    """A speed-up over the control that is the same for few and for many clusters.

    Where MACs were measured, their ratio judges the speed-up instead.
    """
    faster = {j.group.label: j.speedup.value for j in judgements if j.pace == "faster" and j.speedup}
    for name, groups in study.series():
        samples = {g.label: values for g in groups if (values := g.values(SECONDS))}
        few, many = groups[0], groups[-1]
        all_timed = len(samples) == len(groups) and {few.label, many.label} <= faster.keys()
        if not all_timed or any(group.values(MACS) for group in groups):
            continue
        # At least twice as many filters left, yet at most 1.3 times the time, and no difference that a test finds.
        means = [_mean(samples[few.label]), _mean(samples[many.label])]
        more, p = (many.clusters or 1) / (few.clusters or 1), stats.kruskal_wallis(samples).p
        if more < 2 or means[1] > 1.3 * means[0] or p < ALPHA:
            continue
        suspects = tuple(g.label for g in groups if g.label in faster)
        text = (
            f"With {name}, inference is about {times(_mean([faster[label] for label in suspects]))} as fast as with "
            f"{study.control} at every setting: the mean is {number(means[0], 'seconds')} s with {few.clusters} "
            f"clusters and {number(means[1], 'seconds')} s with {many.clusters} (Kruskal–Wallis among the settings: "
            f"{p_words(p)}). With {more:g} times as many filters left, the network should be slower. A speed-up that "
            "does not depend on the number of filters is not caused by removing filters; suspect the measurement, or a "
            "difference between the two programs."
        )
        yield StudyWarning("A speed-up that does not depend on what is left", text, suspects=suspects)


def _dunn(study: Study) -> Iterator[StudyWarning]:
    for measure in TESTED:
        samples, control = study.samples(measure), study.control
        if control is None or control not in samples or len(samples) < 3:
            continue
        overall = stats.kruskal_wallis(samples).p
        raw, holm = stats.dunn(samples, None), stats.dunn(samples, "holm")
        others = [label for label in samples if label != control]
        below = [label for label in others if raw.p(control, label) < ALPHA]
        left = [label for label in below if holm.p(control, label) < ALPHA]
        if overall >= ALPHA or len(left) == len(below):
            continue
        worst = max(raw.p(control, label) for label in below)
        kept = ", ".join(f"{label}, {p_words(holm.p(control, label))}" for label in left)
        pairs = len(samples) * (len(samples) - 1) // 2
        text = (
            f"Kruskal–Wallis finds that some group differs ({p_words(overall)}). Of {len(others)} comparisons with "
            f"{control}, {len(below)} are under .05 uncorrected (up to {p_words(worst)}); after Holm’s correction over "
            f"all {pairs} pairs, {len(left) or 'none'}{f' ({kept})' if left else ''}. So the corrected test does not "
            "show that every setting differs from the control. To compare with one control, see the permutation tests "
            "under Tests, which are corrected for fewer comparisons."
        )
        title = f"{measure.title}: Dunn’s test loses its significance under Holm"
        yield StudyWarning(title, text, note=2 * len(left) >= len(below))


def _no_difference_is_not_equality(study: Study, judgements: Sequence[Judgement]) -> Iterator[StudyWarning]:
    samples = study.samples(TOP1)
    if len(samples) < 2 or not judgements:
        return
    p = stats.kruskal_wallis(samples).p
    if p < ALPHA:
        return
    kept = [j.group.label for j in judgements if j.kept]
    shown = f"It is shown for {', '.join(kept)}." if kept else "It is shown for none of the settings."
    text = (
        f"Kruskal–Wallis on top-1 gives {p_words(p)}. That does not show that accuracy is kept: with few trials a real "
        "loss goes unseen just as easily. “No worse” needs a margin fixed beforehand, here "
        f"{points(judgements[0].margin)}, and a test against that margin. {shown}"
    )
    yield StudyWarning("“No significant difference” is not “equal”", text, note=bool(kept))


def _pooled(study: Study) -> Iterator[StudyWarning]:
    control = study.reference
    base = control.values(TOP1) if control else []
    for name, groups in study.series():
        pool = [x for group in groups for x in group.values(TOP1)]
        if control is None or control in groups or min(len(pool), len(base)) < 2:
            continue
        p, change = stats.mann_whitney(pool, base).p, stats.mean_difference(pool, base).value
        if p >= ALPHA:
            continue
        text = (
            f"Pooled over its {len(groups)} settings, {name} has a mean top-1 of {_mean(pool):.3f} against "
            f"{_mean(base):.3f} of {control.label}: {signed(change, 3)} points, {'lower' if change < 0 else 'higher'} "
            f"(Mann–Whitney, {len(pool)} against {len(base)} trials: {p_words(p)}). Small groups may hide this "
            "difference; the pool treats all settings as one."
        )
        yield StudyWarning(f"All settings of {name} together", text, note=change >= 0)


def _power(judgements: Sequence[Judgement]) -> Iterator[StudyWarning]:
    if words := power_words(judgements):
        yield StudyWarning("What this number of trials can show", words, note=True)


def _tests_disagree(study: Study, judgements: Sequence[Judgement]) -> Iterator[StudyWarning]:
    """Verdicts rest on Welch's t; say where the test without assumptions can't confirm them."""
    decided = {j.group.label for j in judgements if j.accuracy in ("worse", "better")}
    tests = [t for t in control_tests(study, TOP1) if t.group.label in decided] if decided else []
    weak = [t for t in tests if t.p_adjusted is not None and t.p_adjusted >= ALPHA]
    if not weak:
        return
    cases = ", ".join(f"{t.group.label} ({p_words(t.p_adjusted)})" for t in weak)
    text = (
        f"The verdict on {cases} rests on Welch’s t-test; the permutation test with Holm’s correction does not confirm "
        "it. More trials would decide."
    )
    yield StudyWarning("Where the tests disagree", text, note=True)


def _timing(study: Study) -> Iterator[StudyWarning]:
    modes = {timing.get("mode") for trial in study.trials if (timing := trial.get("timing"))}
    if modes <= {"together"} and modes:
        return
    if modes:
        text = (
            "Some networks were timed alone, right after their own training, and not in turn with the others in one "
            "process. Their times include whatever else the machine did then."
        )
        yield StudyWarning("Times were not measured side by side", text)
    environments = [env for trial in study.trials if (env := trial.get("environment"))]
    machines = {tuple(env.get(key) for key in ("processor", "device", "threads")) for env in environments}
    if len(machines) > 1:
        text = (
            f"The trials ran on {len(machines)} different combinations of processor, device and threads; their times "
            "can’t be compared."
        )
        yield StudyWarning("Different machines", text)


def _unsteady_timing(study: Study) -> Iterator[StudyWarning]:
    """The same network under two names should take the same time."""
    timings = [trial.get("timing") or {} for trial in study.trials]
    ratios = [r for t in timings for r in (t.get("control"), *(t.get("controls") or {}).values()) if r]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)), default=1.0)
    if abs(worst - 1) <= AA_TOLERANCE:
        return
    text = (
        f"One network was timed twice under two names; its times differ by a factor of {worst:.2f} at worst (1.00 "
        "would be right). The machine was busy with something else: differences of that size mean nothing."
    )
    yield StudyWarning("The A/A control is off", text)


def _wasted(study: Study) -> Iterator[StudyWarning]:
    counts = ", ".join(f"{label} {len(remarks)}" for label, remarks in wasted_by_label(study).items())
    text = (
        "Some layers are no faster than they would be at the next width that suits the hardware: removing those "
        f"filters saved no time. Layers concerned: {counts}; they are listed under Widths. --round-to 16 (a CPU) or 8 "
        "(a GPU) keeps such filters."
    )
    if counts:
        yield StudyWarning("Widths that save no time", text)


def _provenance(study: Study) -> Iterator[StudyWarning]:
    environments = [env for trial in study.trials if (env := trial.get("environment"))]
    commits = {env.get("commit") for env in environments if env.get("commit")}
    if len(commits) > 1:
        yield StudyWarning("Different versions of the code", f"The trials come from {len(commits)} commits.")
    if any(env.get("dirty") for env in environments):
        text = "Some trials ran from a working tree that differs from its commit."
        yield StudyWarning("Uncommitted changes", text)
    if study.failed:
        total = len(study.failed) + len(study.trials)
        text = f"{len(study.failed)} of {total} trials failed and are in no mean; their reasons are listed."
        yield StudyWarning("Failed trials are left out", text)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
