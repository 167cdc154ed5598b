"""What networks cost: speed-up of calls at every batch size, training, and widths that save nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .. import stats
from .format import ratio_interval, times
from .study import MACS, TOP1, TRAINING, Group, Measure, Study, call_seconds, ratio_of_means
from .table import Cell, Table, cell, mean_cell

_MILLISECONDS = Measure("milliseconds", "Time of a call", "ms", "seconds")


@dataclass(frozen=True, slots=True)
class Speed:
    """One group at one batch size: seconds a call of its trials, and the control's mean over its mean."""

    group: Group
    size: int
    seconds: tuple[float, ...]
    ratio: stats.Difference | None
    macs_ratio: float | None

    @property
    def exceeds_saved_work(self) -> bool:
        """Whether the speed-up exceeds the ratio of MACs, interval and all (a single trial: by 5 %)."""
        if self.ratio is None or self.macs_ratio is None:
            return False
        least = self.ratio.value / 1.05 if self.ratio.low is None else self.ratio.low
        return least > max(self.macs_ratio, 1.0)


def speeds(study: Study) -> list[Speed]:
    """Every group at every batch size that it was timed at; the control, by definition, has no ratio."""
    control, found = study.reference, []
    for group in study.groups:
        for size in study.batch_sizes:
            seconds, theirs = (g.values(call_seconds(size)) if g else [] for g in (group, control))
            ratio = stats.mean_ratio(theirs, seconds) if seconds and theirs and group != control else None
            if seconds:
                found.append(Speed(group, size, tuple(seconds), ratio, ratio_of_means(control, group, MACS)))
    return found


def controls(study: Study) -> list[tuple[int, float]]:
    """Batch size and ratio of the timing pass's A/A controls: one network timed twice under two names."""
    found: dict[str, float] = {}
    for trial in study.trials:
        found |= (trial.get("timing") or {}).get("controls") or {}
    return sorted((int(size), ratio) for size, ratio in found.items())


def wasted_by_label(study: Study) -> dict[str, list[str]]:
    """Label → the timing pass's remarks on layers whose widths save nothing."""
    timings = [(group.label, trial.get("timing") or {}) for group in study.groups for trial in group.trials]
    return {label: list(timing["wasted"]) for label, timing in timings if timing.get("wasted")}


def latency(study: Study) -> Table | None:
    """Time of a call at every batch size, images a second, and the speed-up beside the ratio of MACs."""
    rows: list[tuple[Cell, ...]] = []
    for speed in speeds(study):
        mean, ratio = stats.summarise(speed.seconds).mean, speed.ratio
        cells = (cell(None), cell(None), cell(None))
        if ratio is not None:
            cells = (
                cell(ratio.value, times(ratio.value)),
                Cell(ratio_interval(ratio)),
                cell(speed.macs_ratio, times(speed.macs_ratio)),
            )
        call = mean_cell([1e3 * x for x in speed.seconds], _MILLISECONDS)
        rate = speed.size / mean
        rows.append((cell(speed.group.label), cell(speed.size), *cells, call, cell(rate, f"{rate:,.0f}")))
    if not rows:
        return None
    columns = ("Method", "Batch", "Speed-up", "95 % interval", "MACs ratio", "Call, ms", "Images a second")
    notes = [
        "All networks were timed in turn in one process; a trial’s time is the median over the rounds. Mean ± standard "
        "deviation between trials, which differ in their networks’ weights and widths."
    ]
    if found := controls(study):
        sizes = ", ".join(f"{times(ratio)} at batch {size}" for size, ratio in found)
        notes.append(f"The same network timed twice (A/A control): {sizes}.")
    return Table("latency", "Latency at every batch size", columns, tuple(rows), tuple(notes), True)


def training(study: Study) -> Table | None:
    """Top-1 beside what training took: time, images, multiply-accumulates, each also relative to the control."""
    measures = [measure for measure in TRAINING if study.samples(measure)]
    if not measures:
        return None
    control, rows = study.reference, []
    for group in study.groups:
        cells = [cell(group.label), cell(group.n), mean_cell(group.values(TOP1), TOP1)]
        for measure in measures:
            share = ratio_of_means(group, control, measure) if control else None
            cells += [mean_cell(group.values(measure), measure), cell(share, times(share))]
        rows.append(tuple(cells))
    beside = f"× {study.control}" if study.control else "×"
    columns = ("Method", "n", TOP1.heading, *(name for m in measures for name in (m.heading, beside)))
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


def wasted(study: Study) -> Table | None:
    """Layers whose widths save nothing, as the timing pass found them in one network of each label."""
    rows = tuple((cell(label), cell(remark)) for label, found in wasted_by_label(study).items() for remark in found)
    note = "Every layer alone, at batch 64, in turn with itself rounded up to the next width that suits the hardware."
    if not rows:
        return None
    return Table("wasted_widths", "Widths that save nothing", ("Method", "Layer"), rows, (note,), True)
