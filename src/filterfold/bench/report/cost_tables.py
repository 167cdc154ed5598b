"""What networks cost to run and to train: speed-up at every batch size, and training beside the control's."""

from __future__ import annotations

from dataclasses import dataclass

from .. import stats
from .format import MISSING, mean_sd, significant, times
from .study import MACS, TOP1, TRAINING, Group, Measure, Study, batch_sizes, calls
from .table import Cell, Table, heading

MILLISECONDS = Measure("milliseconds", "Time of a call", "ms", "seconds")


@dataclass(frozen=True, slots=True)
class Speed:
    """One group at one batch size: seconds a call of its trials, and the control's mean over its mean."""

    group: Group
    size: int
    seconds: tuple[float, ...]
    ratio: stats.Difference | None
    macs_ratio: float | None

    @property
    def beyond_the_work(self) -> bool:
        """Whether the speed-up exceeds the ratio of MACs, interval and all (a single trial: by 5 %)."""
        if self.ratio is None or self.macs_ratio is None:
            return False
        least = self.ratio.value / 1.05 if self.ratio.low is None else self.ratio.low
        return least > max(self.macs_ratio, 1.0)


def speeds(study: Study) -> list[Speed]:
    """Every group at every batch size that it was timed at; the control, by definition, has no ratio."""
    return [
        _speed(study, group, size, seconds)
        for group in study.groups
        for size in batch_sizes(study)
        if (seconds := group.values(calls(size)))
    ]


def _speed(study: Study, group: Group, size: int, seconds: list[float]) -> Speed:
    control, ratio = study.reference, None
    theirs = control.values(calls(size)) if control else []
    if control is not None and group.label != control.label and theirs:
        ratio = stats.mean_ratio(theirs, seconds)
    return Speed(group, size, tuple(seconds), ratio, relative(control, group, MACS))


def relative(whole: Group | None, part: Group, measure: Measure) -> float | None:
    """Mean of one group over the mean of another, where both have the measure."""
    ours, theirs = part.values(measure), whole.values(measure) if whole else []
    if not ours or not theirs or not sum(ours):
        return None
    return (sum(theirs) / len(theirs)) / (sum(ours) / len(ours))


def latency(study: Study) -> Table | None:
    """Time of a call at every batch size, images a second, and the speed-up beside the ratio of MACs."""
    found = speeds(study)
    if not found:
        return None
    rows = []
    for speed in found:
        mean = stats.summarise(speed.seconds).mean
        ratio, bounds = speed.ratio, MISSING
        if ratio is not None and ratio.low is not None:
            bounds = f"{times(ratio.low)} … {times(ratio.high)}"
        rows.append(
            (
                Cell(speed.group.label),
                Cell(str(speed.size), speed.size),
                Cell(times(ratio.value) if ratio else MISSING, ratio.value if ratio else None),
                Cell(bounds),
                Cell(times(speed.macs_ratio), speed.macs_ratio) if ratio else Cell(MISSING),
                Cell(mean_sd([1e3 * x for x in speed.seconds], MILLISECONDS), 1e3 * mean),
                Cell(f"{speed.size / mean:,.0f}", speed.size / mean),
            )
        )
    columns = ("Method", "Batch", "Speed-up", "95 % interval", "MACs ratio", "Call, ms", "Images a second")
    notes = (
        "All networks were timed in turn in one process; a trial’s time is the median over the rounds. Mean ± standard "
        "deviation between trials, which differ in their networks’ weights and widths.",
        *_controls(study),
    )
    return Table("latency", "Latency at every batch size", columns, tuple(rows), notes, True)


def _controls(study: Study) -> list[str]:
    """The A/A controls of the timing pass in words."""
    found: dict[str, float] = {}
    for trial in study.trials:
        found |= (trial.get("timing") or {}).get("controls") or {}
    if not found:
        return []
    sizes = ", ".join(
        f"{times(ratio)} at batch {size}" for size, ratio in sorted(found.items(), key=lambda x: int(x[0]))
    )
    return [f"The same network timed twice (A/A control): {sizes}."]


def wasted(study: Study) -> Table | None:
    """Layers whose widths save nothing, as the timing pass found them in one network of each label."""
    found = wasted_by_label(study)
    rows = tuple((Cell(label), Cell(remark)) for label, remarks in found.items() for remark in remarks)
    note = "Every layer alone, at batch 64, in turn with itself rounded up to the next width that suits the hardware."
    return (
        Table("wasted_widths", "Widths that save nothing", ("Method", "Layer"), rows, (note,), True) if rows else None
    )


def wasted_by_label(study: Study) -> dict[str, list[str]]:
    """Label → remarks of the timing pass."""
    timings = [(group.label, trial.get("timing") or {}) for group in study.groups for trial in group.trials]
    return {label: list(timing["wasted"]) for label, timing in timings if timing.get("wasted")}


def training(study: Study) -> Table | None:
    """Top-1 beside what training took: time, images, multiply-accumulates, each also relative to the control."""
    measures = [measure for measure in TRAINING if study.samples(measure)]
    if not measures:
        return None
    control, rows = study.reference, []
    for group in study.groups:
        cells = [Cell(group.label), Cell(str(group.n), group.n), _mean(group, TOP1)]
        for measure in measures:
            share = relative(group, control, measure) if control else None
            text = MISSING if share is None else f"{significant(share, 3)}×"
            cells += [_mean(group, measure), Cell(text, share)]
        rows.append(tuple(cells))
    beside = f"× {study.control}" if study.control else "×"
    columns = ("Method", "n", heading(TOP1), *(name for m in measures for name in (heading(m), beside)))
    notes = [
        "From fresh weights to the final network: methods that begin with a trained network include its training. Time "
        "is that of the epochs, without validation; trials that ran side by side slowed each other down."
    ]
    if any(measure.key == "train_macs" for measure in measures):
        notes.append(
            "MACs of training: images times three forward passes (one forward, two backward) of the network as it was "
            "in each epoch. Scoring, clustering and the pull on filters are not in them; they are in the time."
        )
    return Table("training", "What training takes", columns, tuple(rows), tuple(notes), True)


def _mean(group: Group, measure: Measure) -> Cell:
    values = group.values(measure)
    return Cell(mean_sd(values, measure), stats.summarise(values).mean if values else None)
