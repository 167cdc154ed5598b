"""Which trial may begin while others run: two must not train the same dense network at the same time."""

from __future__ import annotations

from collections.abc import Iterable

from .bench import Bench
from .config import DENSE_LONG, SCRATCH, SCRATCH_LONG, Trial


def take_next(waiting: list[Trial], running: Iterable[Trial], bench: Bench) -> Trial | None:
    """Take off the list the first trial that need not wait for what a running one is just making.

    Dense trials and those that begin with a dense network train it once for each seed; whoever comes second finds it
    done, or is passed over as long as it is being trained.

    **Returns:** the trial, or None if all have to wait, or none is left.
    """
    busy = {base for trial in running if (base := needed(trial, bench)) is not None}
    for place, trial in enumerate(waiting):
        if needed(trial, bench) not in busy:
            return waiting.pop(place)
    return None


def needed(trial: Trial, bench: Bench) -> str | None:
    """Id of the dense training that a trial would have to do first, or None."""
    if trial.is_online or trial.plain in (SCRATCH, SCRATCH_LONG, DENSE_LONG) or trial.setting.weights is not None:
        return None
    base = trial.base.id
    return None if bench.base_file(base, ".json").exists() else base
