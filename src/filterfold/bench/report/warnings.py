"""Readings: what the numbers do and don't allow to be concluded, in words, found by rules.

Each rule looks at a study and says nothing, or one paragraph with its figures in it. The rules are
the mistakes that comparisons of pruning methods are known for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import stats
from .cost_tables import speeds, wasted_by_label
from .format import number, p_words, points, signed, times
from .study import MACS, SECONDS, TOP1, TOP5, Group, Study
from .verdict import ALPHA, Judgement, control_tests, power_words

RESTLESS = 0.03
"""An A/A control further than this from 1.00 is worth a warning (`latency.results` has the same)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A title, a paragraph, whether it is a warning, and the groups whose speed-up it casts doubt on."""

    title: str
    text: str
    warning: bool = False
    suspects: tuple[str, ...] = ()


def readings(study: Study, judgements: Sequence[Judgement]) -> list[Reading]:
    """All readings of a study, in the order in which a reader needs them."""
    rules: tuple[Callable[[], list[Reading]], ...] = (
        lambda: _faster_than_the_work(judgements),
        lambda: _calls_faster_than_the_work(study),
        lambda: _speed_without_dose(study, judgements),
        lambda: _dunn(study),
        lambda: _no_difference_is_not_equality(study, judgements),
        lambda: _pooled(study),
        lambda: _power(judgements),
        lambda: _test_disagrees(study, judgements),
        lambda: _timing(study),
        lambda: _restless(study),
        lambda: _wasted(study),
        lambda: _provenance(study),
    )
    return [reading for rule in rules for reading in rule()]


def _faster_than_the_work(judgements: Sequence[Judgement]) -> list[Reading]:
    found = [j for j in judgements if j.suspicious and j.speedup]
    if not found:
        return []
    cases = ", ".join(
        f"{j.group.label} {times(j.speedup.value if j.speedup else None)} at {times(j.macs_ratio)}" for j in found
    )
    text = (
        f"The measured speed-up exceeds the ratio of multiply-accumulates: {cases} fewer MACs. Work that was not "
        "removed "
        "can’t be saved: look for a difference in how the two sides were timed before believing it."
    )
    suspects = tuple(j.group.label for j in found)
    return [Reading("Faster than the saved work explains", text, True, suspects)]


def _calls_faster_than_the_work(study: Study) -> list[Reading]:
    found = [speed for speed in speeds(study) if speed.beyond_the_work]
    if not found:
        return []
    cases = "; ".join(
        f"{s.group.label} at batch {s.size}: {times(s.ratio.value if s.ratio else None)} at {times(s.macs_ratio)}"
        for s in found
    )
    text = (
        f"The measured speed-up of calls exceeds the ratio of multiply-accumulates: {cases} fewer MACs. A network that "
        "fits into a cache where the other does not can do that; else look for a difference in how the two were timed."
    )
    return [Reading("Calls faster than the saved work explains", text, True)]


def _speed_without_dose(study: Study, judgements: Sequence[Judgement]) -> list[Reading]:
    """A speed-up over the control that is the same for few and for many clusters."""
    faster = {j.group.label: j for j in judgements if j.pace == "faster"}
    found = []
    for name, groups in study.series():
        few, many = groups[0], groups[-1]
        samples = {g.label: g.values(SECONDS) for g in groups if g.values(SECONDS)}
        if len(samples) < len(groups) or not {few.label, many.label} <= faster.keys() or _macs_vary(groups):
            continue
        # Half of the proportional effect would be ample evidence of a dose; here there is next to none.
        dose, ratio = (many.clusters or 1) / (few.clusters or 1), _mean(samples[many.label]) / _mean(samples[few.label])
        p = stats.kruskal_wallis(samples).p
        if dose < 2 or ratio > 1.3 or p is None or p < ALPHA:
            continue
        found.append(
            Reading(
                "A speed-up that does not depend on what is left",
                f"With {name}, inference is about {times(_speed(faster, groups))} as fast as with {study.control} at "
                "every setting: the "
                "mean is "
                f"{number(_mean(samples[few.label]), 'seconds')} s with {few.clusters} clusters and "
                f"{number(_mean(samples[many.label]), 'seconds')} s with {many.clusters} (Kruskal–Wallis among the "
                "settings: "
                f"{p_words(p)}). With {dose:g} times as many filters left, the network should be slower. A "
                "speed-up that "
                "does not depend on the number of filters is not caused by removing filters; suspect the measurement, "
                "or a difference between the two programs.",
                True,
                tuple(g.label for g in groups if g.label in faster),
            )
        )
    return found


def _macs_vary(groups: Sequence[Group]) -> bool:
    """Whether MACs were measured; then the ratio of MACs judges the speed-up."""
    return any(group.values(MACS) for group in groups)


def _speed(faster: dict[str, Judgement], groups: Sequence[Group]) -> float:
    found = [j.speedup.value for g in groups if (j := faster.get(g.label)) and j.speedup]
    return _mean(found)


def _dunn(study: Study) -> list[Reading]:
    found = []
    for measure in (SECONDS, TOP1, TOP5):
        samples = study.samples(measure)
        if study.control not in samples or len(samples) < 3:
            continue
        overall = stats.kruskal_wallis(samples).p
        raw, holm = stats.dunn(samples, None), stats.dunn(samples, "holm")
        others = [label for label in samples if label != study.control]
        below = [label for label in others if raw.p(study.control, label) < ALPHA]
        left = [label for label in below if holm.p(study.control, label) < ALPHA]
        if overall is None or overall >= ALPHA or len(left) == len(below):
            continue
        worst = max(raw.p(study.control, label) for label in below)
        kept = ", ".join(f"{label}, {p_words(holm.p(study.control, label))}" for label in left)
        pairs = len(samples) * (len(samples) - 1) // 2
        text = (
            f"Kruskal–Wallis finds that some group differs ({p_words(overall)}). Of {len(others)} comparisons with "
            f"{study.control}, {len(below)} are under .05 uncorrected (up to {p_words(worst)}); after Holm’s "
            "correction "
            f"over all {pairs} pairs, {len(left) or 'none'}{f' ({kept})' if left else ''}. That every setting "
            "differs from "
            "the control under Holm does not follow: only the uncorrected values say so. The comparison against one "
            "control that the question needs is the permutation test, further down."
        )
        title = f"{measure.title}: Dunn’s test loses its significance under Holm"
        found.append(Reading(title, text, 2 * len(left) < len(below)))
    return found


def _no_difference_is_not_equality(study: Study, judgements: Sequence[Judgement]) -> list[Reading]:
    samples = study.samples(TOP1)
    if len(samples) < 2 or not judgements:
        return []
    p = stats.kruskal_wallis(samples).p
    if p is None or p < ALPHA:
        return []
    margin = points(judgements[0].margin)
    kept = [j.group.label for j in judgements if j.accuracy in ("no worse", "better", "lower within the margin")]
    shown = f"It is shown for {', '.join(kept)}." if kept else "It is shown for none of the settings."
    text = (
        f"Kruskal–Wallis on top-1 gives {p_words(p)}. That does not show that accuracy is kept: with few trials "
        "a real "
        f"loss goes unseen just as easily. “No worse” needs a margin fixed beforehand, here {margin}, and a "
        "test "
        f"against that margin. {shown}"
    )
    return [Reading("“No significant difference” is not “equal”", text, not kept)]


def _pooled(study: Study) -> list[Reading]:
    control = study.reference
    found = []
    for name, groups in study.series():
        pool = [x for group in groups for x in group.values(TOP1)]
        base = control.values(TOP1) if control else []
        if control is None or control in groups or len(pool) < 2 or len(base) < 2:
            continue
        test, change = stats.mann_whitney(pool, base), stats.mean_difference(pool, base).value
        if test.p is None or test.p >= ALPHA:
            continue
        word = "lower" if change < 0 else "higher"
        found.append(
            Reading(
                f"All settings of {name} together",
                f"Pooled over its {len(groups)} settings, {name} has a mean top-1 of {_mean(pool):.3f} against "
                f"{_mean(base):.3f} of "
                f"{control.label}: {signed(change, 3)} points, {word} (Mann–Whitney, {len(pool)} against {len(base)} "
                "trials: "
                f"{p_words(test.p)}). Split into small groups this difference may hide; the pool treats all "
                "settings as one.",
                change < 0,
            )
        )
    return found


def _power(judgements: Sequence[Judgement]) -> list[Reading]:
    words = power_words(judgements)
    return [Reading("What this number of trials can show", words)] if words else []


def _test_disagrees(study: Study, judgements: Sequence[Judgement]) -> list[Reading]:
    """Verdicts rest on Welch's t; say where the test without assumptions can't confirm them."""
    decided = [j for j in judgements if j.accuracy in ("worse", "better")]
    if not decided:
        return []
    tests = control_tests(study, TOP1)
    weak = {t.group.label: t.p_adjusted for t in tests if t.p_adjusted is not None and t.p_adjusted >= ALPHA}
    names = [j.group.label for j in decided if j.group.label in weak]
    if not names:
        return []
    cases = ", ".join(f"{name} ({p_words(weak[name])})" for name in names)
    text = (
        f"The verdict on {cases} rests on Welch’s t-test; the permutation test with Holm does not confirm it. More "
        "trials would decide."
    )
    return [Reading("Where the tests disagree", text)]


def _timing(study: Study) -> list[Reading]:
    timings = [trial.get("timing") or {} for trial in study.trials]
    modes = {timing.get("mode") for timing in timings if timing}
    found = []
    if modes and modes != {"together"}:
        text = (
            "Some networks were timed alone, right after their own training, and not interleaved with the others in "
            "one "
            "process. Anything else that the machine did then is in the figures."
        )
        found.append(Reading("Times were not measured side by side", text, True))
    machines = {
        (env.get("processor"), env.get("device"), env.get("threads"))
        for trial in study.trials
        if (env := trial.get("environment"))
    }
    if len(machines) > 1 and modes != {"together"}:
        text = (
            f"The trials ran on {len(machines)} different combinations of processor, device, and threads; their "
            "times can’t be compared."
        )
        found.append(Reading("Different machines", text, True))
    return found


def _restless(study: Study) -> list[Reading]:
    """The same network under two names should take the same time."""
    worst = 1.0
    for trial in study.trials:
        timing = trial.get("timing") or {}
        for ratio in (timing.get("control"), *(timing.get("controls") or {}).values()):
            if ratio and abs(math.log(ratio)) > abs(math.log(worst)):
                worst = ratio
    if abs(worst - 1) <= RESTLESS:
        return []
    text = (
        f"One network was timed twice under two names; its times differ by a factor of {worst:.2f} at worst (1.00 "
        "would be right). The machine was busy with something else: differences of that size mean nothing."
    )
    return [Reading("The A/A control is off", text, True)]


def _wasted(study: Study) -> list[Reading]:
    found = wasted_by_label(study)
    if not found:
        return []
    counts = ", ".join(f"{label} {len(remarks)}" for label, remarks in found.items())
    text = (
        "Some layers are no faster than they would be at the next width that the hardware likes: as far as time goes, "
        f"those filters were taken out for nothing. Layers concerned: {counts}; they are listed under Widths. "
        "--round-to 16 (a CPU) or 8 (a GPU) keeps such filters."
    )
    return [Reading("Widths that waste what they saved", text, True)]


def _provenance(study: Study) -> list[Reading]:
    found = []
    environments = [env for trial in study.trials if (env := trial.get("environment"))]
    commits = {env.get("commit") for env in environments if env.get("commit")}
    if len(commits) > 1:
        found.append(Reading("Different versions of the code", f"The trials come from {len(commits)} commits.", True))
    if any(env.get("dirty") for env in environments):
        found.append(
            Reading("Uncommitted changes", "Some trials ran from a working tree that differs from its commit.", True)
        )
    if study.failed:
        text = (
            f"{len(study.failed)} of {len(study.failed) + len(study.trials)} trials failed and are in no mean; their "
            "reasons are listed."
        )
        found.append(Reading("Failed trials are left out", text, True))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
