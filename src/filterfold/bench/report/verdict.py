"""The verdict on each method against the control, in numbers and in words.

Accuracy is judged on top-1 by Welch's t-interval against a margin fixed beforehand, time on the
logarithm of the seconds; p-values are corrected by Holm over the methods that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .. import stats
from .format import interval, points, ratio_interval, signed, times
from .study import MACS, SECONDS, TOP1, Group, Measure, Record, Study, call_seconds, ratio_of_means

ALPHA = 0.05

Accuracy = Literal["better", "no worse", "lower within the margin", "worse", "not shown", "not measured"]
Pace = Literal["faster", "slower", "not shown", "not measured"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One group against the control.

    `speedup` is control time over the group's time for the whole test set, `macs_ratio` control MACs over the group's,
    `call` the smallest batch size that was timed and the speed-up there. The
    p-values `p_not_worse`, `p_differs`, `p_pace` are corrected over the methods.
    """

    group: Group
    control: Group
    margin: float
    top1: stats.Difference | None = None
    tost: stats.Equivalence | None = None
    p_not_worse: float | None = None
    p_differs: float | None = None
    speedup: stats.Difference | None = None
    p_pace: float | None = None
    macs_ratio: float | None = None
    paired: bool = False
    call: tuple[int, float] | None = None

    @property
    def accuracy(self) -> Accuracy:
        """The word for accuracy."""
        if self.top1 is None:
            return "not measured"
        differs = self.p_differs is not None and self.p_differs < ALPHA
        if differs and self.top1.value > 0:
            return "better"
        if self.p_not_worse is not None and self.p_not_worse < ALPHA:
            return "lower within the margin" if differs else "no worse"
        return "worse" if differs else "not shown"

    @property
    def kept(self) -> bool:
        """Whether a loss of the margin or more is ruled out."""
        return self.accuracy in ("no worse", "better", "lower within the margin")

    @property
    def pace(self) -> Pace:
        """The word for inference time."""
        if self.speedup is None:
            return "not measured"
        if self.p_pace is None or self.p_pace >= ALPHA:
            return "not shown"
        return "faster" if self.speedup.value > 1 else "slower"

    @property
    def wins(self) -> bool:
        """Whether it is shown to be both faster and no worse."""
        return self.kept and self.pace == "faster"

    @property
    def suspicious(self) -> bool:
        """Whether the measured speed-up exceeds the ratio of MACs by more than timing noise."""
        return (
            self.pace == "faster"
            and self.speedup is not None
            and self.macs_ratio is not None
            and self.speedup.value > 1.05 * self.macs_ratio
        )


def judge(study: Study, margin: float = 0.5) -> list[Judgement]:
    """Compare every group with the control, the winners first, the fastest first; empty if the study has no control.

    **Arguments:**

    - `study`: the trials.
    - `margin`: the largest loss of top-1, in points, that counts as "no worse"; fix it beforehand.
    """
    control = study.reference
    if control is None:
        return []
    smallest = next(iter(study.batch_sizes), None)
    found = [_measure(group, control, margin, smallest) for group in study.others]
    not_worse = stats.holm([j.tost.p_not_worse if j.tost else None for j in found])
    differs = stats.holm([j.top1.p if j.top1 else None for j in found])
    pace = stats.holm([j.speedup.p if j.speedup else None for j in found])
    judged = [
        replace(judgement, p_not_worse=a, p_differs=b, p_pace=c)
        for judgement, a, b, c in zip(found, not_worse, differs, pace, strict=True)
    ]
    return sorted(judged, key=lambda j: -j.speedup.value if j.wins and j.speedup else 0)


def _measure(group: Group, control: Group, margin: float, smallest: int | None) -> Judgement:
    top1, seconds = matched(group, control, TOP1), matched(group, control, SECONDS)
    judgement = Judgement(group, control, margin, macs_ratio=ratio_of_means(control, group, MACS))
    if top1:
        ours, theirs, paired = top1.ours, top1.theirs, top1.paired
        difference = stats.mean_difference(ours, theirs, paired=paired)
        tost = stats.equivalence(ours, theirs, margin=margin, alpha=ALPHA, paired=paired)
        judgement = replace(judgement, top1=difference, tost=tost, paired=paired)
    if seconds and min(*seconds.ours, *seconds.theirs) > 0:
        judgement = replace(judgement, speedup=stats.mean_ratio(seconds.theirs, seconds.ours))
    call = matched(group, control, call_seconds(smallest)) if smallest is not None else None
    if smallest is not None and call:
        judgement = replace(judgement, call=(smallest, stats.mean_ratio(call.theirs, call.ours).value))
    return judgement


@dataclass(frozen=True, slots=True)
class Samples:
    """A measure's values of a group and of the control; if `paired`, entry i of both belongs together."""

    ours: list[float]
    theirs: list[float]
    paired: bool


def matched(group: Group, control: Group, measure: Measure) -> Samples | None:
    """The two samples of a measure; None where one side does not have it.

    They are paired where every trial of the group went on from a trained network (its history has a `retrain` phase)
    and the control has a trial with its seed; the control's further trials are left out then. Times are never paired:
    they depend on the machine and the moment, not on the checkpoint.
    """
    ours, theirs = group.values(measure), control.values(measure)
    if not ours or not theirs:
        return None
    seeds = [trial.get("seed") for trial in group.trials]
    others = {trial.get("seed"): trial for trial in control.trials}
    complete = len(ours) == group.n and len(theirs) == control.n == len(others)
    one_to_one = len(set(seeds)) == len(seeds) and set(seeds) <= set(others) and None not in seeds
    went_on = all(_went_on(trial) for trial in group.trials)
    if measure.kind == "seconds" or not (complete and one_to_one and went_on):
        return Samples(ours, theirs, False)
    partners = replace(control, trials=tuple(others[seed] for seed in seeds))
    return Samples(ours, partners.values(measure), True)


@dataclass(frozen=True, slots=True)
class ControlTest:
    """The permutation test of one group against the control; `p_adjusted` is corrected by Holm over the groups."""

    group: Group
    samples: Samples
    result: stats.Significance
    p_adjusted: float | None


def control_tests(study: Study, measure: Measure) -> list[ControlTest]:
    """Permutation tests of one measure, one for each group that has it; empty without a control."""
    control = study.reference
    found = [(group, both) for group in study.others if control and (both := matched(group, control, measure))]
    results = [stats.permutation(both.ours, both.theirs, paired=both.paired) for _, both in found]
    adjusted = stats.holm([result.p for result in results])
    return [ControlTest(*one, result, p) for one, result, p in zip(found, results, adjusted, strict=True)]


def _went_on(trial: Record) -> bool:
    return any(entry.get("phase") == "retrain" for entry in trial.get("history") or ())


_UNCORRECTED = "; significant only before it is corrected for the number of settings"


def accuracy_words(j: Judgement) -> str:
    """One clause on accuracy, with its interval and n."""
    if j.top1 is None or j.tost is None:
        return "accuracy was not measured"
    margin = points(j.margin)
    change = f"{signed(j.top1.value)} points top-1"
    if j.tost.low is None:
        return f"one trial can’t tell whether accuracy is kept ({change}; {j.top1.notes[0]})"
    found = f"{change}, 90 % interval {interval(j.tost.low, j.tost.high)}"
    if j.accuracy == "not shown" and min(j.tost.p_not_worse or 1, j.top1.p or 1) < ALPHA:
        found += _UNCORRECTED
    return {
        "better": f"accuracy is better ({found})",
        "no worse": f"accuracy is no worse within {margin} ({found})",
        "lower within the margin": f"accuracy is lower, but by less than {margin} ({found})",
        "worse": f"accuracy is worse ({found})",
        "not shown": f"too few or too unsteady trials to tell whether accuracy is kept within {margin} ({found})",
    }[j.accuracy]


def pace_words(j: Judgement) -> str:
    """One clause on inference time, with its interval."""
    if j.speedup is None:
        return "inference time was not measured"
    ratio = times(j.speedup.value)
    if j.speedup.low is None or j.speedup.high is None:
        return f"one trial can’t tell whether inference is faster (ratio {ratio}; {j.speedup.notes[0]})"
    bounds = f"95 % interval {ratio_interval(j.speedup)}"
    if j.pace == "faster":
        return f"inference is {ratio} faster over the test set{call_words(j)} ({bounds})"
    if j.pace == "slower":
        slower = f"{times(1 / j.speedup.value)} the time over the test set{call_words(j)}"
        return f"inference is slower: {slower} ({bounds} of the speed)"
    note = _UNCORRECTED if (j.speedup.p or 1) < ALPHA else ""
    return f"inference is as fast as far as these trials can tell ({ratio} over the test set, {bounds}{note})"


def call_words(j: Judgement) -> str:
    """The speed-up at the smallest batch size, if that was timed."""
    return f", {times(j.call[1])} at batch {j.call[0]}" if j.call else ""


def sentence(j: Judgement) -> str:
    """The whole verdict on one method, as the terminal and the page print it."""
    size = f", {times(j.macs_ratio)} fewer MACs" if j.macs_ratio and j.macs_ratio > 1.005 else ""
    n = f"n = {j.group.n} against {j.control.n}"
    return f"{j.group.label} ({n}{size}): {pace_words(j)}; {accuracy_words(j)}."


def headline(study: Study, judgements: Sequence[Judgement]) -> str:
    """The verdict on the whole study in one or two sentences."""
    if study.reference is None:
        return "There is no control to compare with, so no method is judged."
    if not judgements:
        return f"Only {study.control} has finished trials: there is nothing to compare with it yet."
    if len(judgements) == 1:
        j = judgements[0]
        return f"Against {study.control}, with {j.group.label} {pace_words(j)}, and {accuracy_words(j)}."
    control, margin = study.control, points(judgements[0].margin)
    kept = [j for j in judgements if j.kept]
    parts = []
    if any(j.speedup for j in judgements):
        faster = [j for j in judgements if j.pace == "faster"]
        parts.append(f"{_count(faster, judgements)} shown to be faster than {control}")
    if any(j.top1 for j in judgements):
        parts.append(f"{_count(kept, judgements)} shown to be no worse in top-1 within {margin}")
        worse = [j for j in judgements if j.accuracy == "worse"]
        parts.append(f"{_count(worse, judgements)} shown to be worse")
    text = f"Of {len(judgements)} settings, {'; '.join(parts)}."
    winners = [j for j in judgements if j.wins]
    if not winners:
        return f"No setting is shown to be both faster and no worse. {text}"
    best, *others = winners
    ratio = f"{times(best.speedup.value if best.speedup else None)} faster than {control} over the test set"
    found = f"{best.group.label} wins: {ratio}{call_words(best)}, and no worse in top-1 within {margin}."
    also = f" Also faster and no worse: {', '.join(j.group.label for j in others)}." if others else ""
    return f"{found}{also} {text}"


def _count(found: Sequence[Judgement], of: Sequence[Judgement]) -> str:
    return {0: "none is", 1: "one is", len(of): "all are"}.get(len(found), f"{len(found)} are")


def power_words(judgements: Sequence[Judgement]) -> str | None:
    """What the number of trials allows: the loss that goes unseen, and the trials that the margin needs."""
    known = [j for j in judgements if j.tost and j.tost.low is not None]
    parts = [_power([j for j in known if j.paired is paired], paired) for paired in (False, True)]
    return " ".join(part for part in parts if part) or None


def _power(known: Sequence[Judgement], paired: bool) -> str | None:
    """For the methods whose trials are paired with the control's, or for those whose are not."""
    spread = math.sqrt(sum(map(_variance, known)) / len(known)) if known else 0.0
    if spread == 0:
        return None
    n, m = min(j.group.n for j in known), known[0].control.n
    unseen, margin = stats.resolvable_difference(n, m, spread, paired=paired), known[0].margin
    trials, needed = f"With {n} against {m} trials and a spread of {spread:.2f} points between trials", ""
    if paired:
        names = ", ".join(j.group.label for j in known)
        trials = f"Of {names}, with {n} pairs of trials and a spread of {spread:.2f} points between their differences"
    else:
        needed = (
            f" To show “no worse within {points(margin)}” of one method that is equal takes about "
            f"{stats.trials_needed(spread, margin)} trials a side."
        )
    return (
        f"{trials}, a loss under {unseen:.2f} points can’t be seen reliably: it is missed more than once in five "
        f"times.{needed}"
    )


def _variance(j: Judgement) -> float:
    """Of the differences if paired, else pooled over both sides."""
    both = matched(j.group, j.control, TOP1)
    if both and both.paired:
        return (stats.summarise([x - y for x, y in zip(both.ours, both.theirs, strict=True)]).sd or 0.0) ** 2
    found = [stats.summarise(group.values(TOP1)) for group in (j.group, j.control)]
    return sum((one.n - 1) * (one.sd or 0.0) ** 2 for one in found) / max(sum(one.n for one in found) - 2, 1)
