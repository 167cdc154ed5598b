"""What a training costs, in images and multiply-accumulates; and how many epochs a given cost pays for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import nn

from ...errors import ConfigError
from ...online import Schedule
from ...profiling.macs import measure
from ...pruning.prune import prune
from ...pruning.scored import PruneResult, Scoring
from ...training import Row
from ..recipes.recipe import keep_shares
from .config import HALF, Trial
from .context import RunContext

STEP = 3
"""Passes of a training step, in forward passes: backward computes two products, for the inputs and for the weights,
where forward computes one (Kaplan et al. 2020, section 2.1)."""


LONGER, LONGER_TUNED = 0.7, 1.0
"""Share of the dense training's multiply-accumulates that a trial with `+longer` may cost: from fresh weights, and from
trained ones."""


Shares = float | Mapping[str, float]


def train_images(trial: Trial, context: RunContext, history: Iterable[Row]) -> int:
    """Images that the epochs of a trial went through, with those of the network that it began with."""
    return sum(_images(trial, context, epoch) for epoch in history)


def train_macs(trial: Trial, context: RunContext, history: Iterable[Row], dense: int) -> int:
    """Multiply-accumulates of all training steps, a teacher's forward passes among them; not what cuts and pulls take.

    **Arguments:**

    - `history`: rows of the epochs; each has the MACs of the network that it ended with.
    - `dense`: MACs an image of the uncut network. Online methods cut at the end of an epoch, so an epoch is that of
      the network that the one before ended with, or between batches, and then there is a mean over these; all others
      cut between training and retraining.
    """
    total, last = 0, dense
    for epoch in history:
        during = epoch.get("mean_macs", last if trial.parsed.is_online else epoch["macs"])
        total += round((STEP * during + epoch.get("extra_macs", 0)) * _images(trial, context, epoch))
        last = epoch["macs"]
    return total


def _images(trial: Trial, context: RunContext, epoch: Row) -> int:
    setting, count = trial.setting, len(context.data.train)
    if trial.parsed.kind == "scratch":
        changes = setting.scratch
    else:
        changes = setting.retrain if epoch["phase"] == "retrain" else {}
    return images_of(count, context.recipe(trial, **changes).batch_size)


def images_of(count: int, batch: int) -> int:
    """Images of one epoch: an incomplete last batch is left out, unless it is the only one.

    >>> images_of(100, 32), images_of(10, 32)
    (96, 10)
    """
    return count // batch * batch if count >= batch else count


def shares(trial: Trial) -> Shares:
    """The share to keep: as asked, the setting's, the paper's own for its own networks, else half."""
    if trial.keep is not None:
        return trial.keep
    return dict(trial.setting.shares) or keep_shares(trial.setting.model) or HALF


def budget(trial: Trial) -> dict[str, Any]:
    """The budget for `prune`: a share of the multiply-accumulates where the trial has one, else of the filters."""
    return {"keep": shares(trial)} if trial.macs is None else {"macs": trial.macs}


def shrink(trial: Trial, context: RunContext, model: nn.Module, asked: Mapping[str, Any]) -> PruneResult:
    """Cut a network with fresh weights, in place; the units that go are drawn at random, as none is better yet."""
    scoring = Scoring(seed=trial.seed)
    return prune(model, context.example, criterion="random", round_to=trial.setting.round_to, scoring=scoring, **asked)


def paid_epochs(trial: Trial, context: RunContext) -> dict[str, Any]:
    """The field of the training recipe that a trial changes if its length depends on its cost; else nothing.

    **Raises:** `ConfigError` for a schedule whose milestones are not known beforehand, and if `+longer` can't pay for
    one epoch.
    """
    if "longer" in trial.parsed.additions:
        return {"epochs": _longer(trial, context)}
    if trial.method == "scratch-long":
        epochs, size = context.recipe(trial).epochs, _sizes(trial, context)
        return {"epochs": max(1, round(_online_cost(trial, context, size, epochs) / size(1.0)))}
    return {}


def _longer(trial: Trial, context: RunContext) -> int:
    """The most epochs for which a trial costs no more than the share `LONGER` of the dense network's training."""
    size, share = _sizes(trial, context), LONGER_TUNED if trial.setting.begins.given else LONGER
    most = share * context.recipe(trial).epochs * size(0.0)
    if not trial.parsed.is_online:
        return max(1, int(most / (size(1.0) + _teaching(trial, context, size))))
    epochs = 0
    while _online_cost(trial, context, size, epochs + 1) <= most:
        epochs += 1
    if not epochs:
        raise ConfigError(f"method {trial.method!r}: {share:g} of the dense training does not pay for an epoch")
    return epochs


def _online_cost(trial: Trial, context: RunContext, size: Callable[[float], int], epochs: int) -> float:
    """Multiply-accumulates an image, summed over the epochs of the online schedule."""
    steps = max(1, len(context.data.train) // context.recipe(trial).batch_size)
    schedule = Schedule.of(trial.online_options["schedule"], epochs, epochs * steps)
    if schedule.patience is not None:
        raise ConfigError(f"method {trial.method!r}: a schedule that waits for a plateau has no cost known beforehand")
    length = 1 if schedule.unit == "epoch" else steps
    spent, since, now = 0, 0, size(0.0)
    for at, share in schedule.milestones:
        spent, since, now = spent + now * (at - since), at, size(share)
    untaught = schedule.milestones[0][0] if trial.teacher == "before the first cut" else 0
    taught = _teaching(trial, context, size) * (epochs * length - untaught)
    return (spent + now * (epochs * length - since) + taught) / length


def _teaching(trial: Trial, context: RunContext, size: Callable[[float], int]) -> float:
    """What a teacher adds to the cost of a training step, in forward passes times `STEP`, as `size` counts."""
    if not trial.parsed.is_taught:
        return 0
    macs = measure(context.teacher(), context.example.cpu()).macs if trial.teacher == "file" else size(0.0)
    return macs / STEP


def _sizes(trial: Trial, context: RunContext) -> Callable[[float], int]:
    """From a share of the way to the budget to the multiply-accumulates of the network that has gone so far."""
    full = measure(context.build(trial.seed), context.example).macs
    return cache(lambda share: full if share == 0 else _size(trial, context, full, share))


def _size(trial: Trial, context: RunContext, full: int, share: float) -> int:
    if trial.macs is not None:
        return int(full * (1 - share * (1 - trial.macs)))
    if trial.clusters is not None:
        raise ConfigError(
            f"method {trial.method!r} takes a share of the filters or of the MACs, not a number of clusters"
        )

    def partly(keep: float) -> float:
        return 1 - share * (1 - keep)

    keep = shares(trial)
    part = {name: partly(kept) for name, kept in keep.items()} if isinstance(keep, Mapping) else partly(keep)
    return shrink(trial, context, context.build(trial.seed), {"keep": part}).after.macs
