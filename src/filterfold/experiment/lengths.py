"""How many epochs a trial may have for what another one costs.

Costs are multiply-accumulates of training steps, counted as by `costs`; they are known before anything is trained,
because a schedule says how wide the network is in each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..cost import measure
from ..errors import ConfigError
from ..online import Schedule
from .afterwards import Shares, drawn, shares
from .bench import Bench
from .config import LONGER, Trial


def equal_epochs(trial: Trial, bench: Bench) -> int:
    """Epochs of the small network that cost what the online schedule with the same budget costs.

    **Raises:** `ConfigError` for a schedule whose milestones are not known beforehand.
    """
    epochs = bench.recipe(trial.seed).epochs
    sizes = _sizes(trial, bench)
    return max(1, round(_online_cost(trial, sizes, epochs) / sizes[1.0]))


def longer_epochs(trial: Trial, bench: Bench) -> int:
    """The most epochs for which a trial costs no more than the share `LONGER` of the dense network's training.

    **Raises:** `ConfigError` as `equal_epochs` does, and if not even one epoch can be paid for.
    """
    sizes = _sizes(trial, bench)
    most = LONGER * bench.recipe(trial.seed).epochs * sizes[0.0]
    if not trial.is_online:
        return max(1, int(most / sizes[1.0]))
    epochs = 1
    while _online_cost(trial, sizes, epochs + 1) <= most:
        epochs += 1
    if _online_cost(trial, sizes, epochs) > most:
        raise ConfigError(f"method {trial.method!r}: {LONGER:g} of the dense training does not pay for an epoch")
    return epochs


def _online_cost(trial: Trial, sizes: Mapping[float, int], epochs: int) -> int:
    """Multiply-accumulates an image, summed over the epochs of the online schedule."""
    spent, since, now = 0, 0, sizes[0.0]
    for at, share in _schedule(trial, epochs).milestones:
        spent, since, now = spent + now * (at - since), at, sizes[share]
    return spent + now * (epochs - since)


def _schedule(trial: Trial, epochs: int) -> Schedule:
    schedule = Schedule.of(trial.schedule, epochs)
    if schedule.patience is not None:
        raise ConfigError(
            f"method {trial.method!r}: what a schedule costs that waits for a plateau is not known before"
        )
    return schedule


def _sizes(trial: Trial, bench: Bench) -> dict[float, int]:
    """Share of the way to the budget → multiply-accumulates of the network that has gone so far."""
    full = measure(bench.build(trial.seed), bench.example).macs
    steps = {share for _, share in _schedule(trial, 100).milestones} | {0.0, 1.0}
    return {share: full if share == 0 else _size(trial, bench, full, share) for share in sorted(steps)}


def _size(trial: Trial, bench: Bench, full: int, share: float) -> int:
    if trial.macs is not None:
        return int(full * (1 - share * (1 - trial.macs)))
    if trial.clusters is not None:
        raise ConfigError(
            f"method {trial.method!r} takes a share of the filters or of the MACs, not a number of clusters"
        )
    keep = shares(trial)
    part: Shares = 1 - share * (1 - keep) if isinstance(keep, float) else {
        pattern: 1 - share * (1 - kept) for pattern, kept in keep.items()
    }  # fmt: skip
    return drawn(trial, bench, bench.build(trial.seed), {"keep": part}).after.macs
