"""What a trial's training came to beside seconds: images seen, and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable

from ..training import Row
from .bench import Bench
from .config import SCRATCH, Trial

STEP = 3
"""Passes of a training step, in forward passes: backward computes two products, for the inputs and for the weights,
where forward computes one (Kaplan et al. 2020, section 2.1)."""


def train_images(trial: Trial, bench: Bench, history: Iterable[Row]) -> int:
    """Images that the epochs of a trial went through, with those of the network that it began with."""
    return sum(_images(trial, bench, epoch) for epoch in history)


def train_macs(trial: Trial, bench: Bench, history: Iterable[Row], dense: int) -> int:
    """Multiply-accumulates of all training steps, a teacher's forward passes among them; not what cuts and pulls take.

    **Arguments:**

    - `history`: rows of the epochs; each has the MACs of the network that it ended with.
    - `dense`: MACs an image of the uncut network. Online methods cut at the end of an epoch, so an epoch is that of
      the network that the one before ended with; all others cut between training and retraining.
    """
    total, last = 0, dense
    for epoch in history:
        during = last if trial.is_online else epoch["macs"]
        total += (STEP * during + epoch.get("extra_macs", 0)) * _images(trial, bench, epoch)
        last = epoch["macs"]
    return total


def _images(trial: Trial, bench: Bench, epoch: Row) -> int:
    """Images of one epoch: an incomplete last batch is left out, unless it is the only one."""
    setting, count = trial.setting, len(bench.data.train)
    if trial.method.startswith(SCRATCH):
        changes = setting.scratch
    else:
        changes = setting.retrain if epoch["phase"] == "retrain" else {}
    batch = bench.recipe(trial.seed, **changes).batch_size
    return count // batch * batch if count >= batch else count
