"""What each compared method does after or beside training: its cost, its cuts, its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from torch import nn

from ...errors import ConfigError
from ...graph import trace
from ...online import Schedule
from ...plan import Plan
from ...profiling.macs import measure
from ...pruning.prune import PruneResult, Scoring, prune
from ...training import Row, train
from ..recipes.recipe import keep_shares
from .config import LONGER, SCRATCH, SCRATCH_LONG, Trial
from .context import RunContext

STEP = 3
"""Passes of a training step, in forward passes: backward computes two products, for the inputs and for the weights,
where forward computes one (Kaplan et al. 2020, section 2.1)."""


def train_images(trial: Trial, bench: RunContext, history: Iterable[Row]) -> int:
    """Images that the epochs of a trial went through, with those of the network that it began with."""
    return sum(_images(trial, bench, epoch) for epoch in history)


def train_macs(trial: Trial, bench: RunContext, history: Iterable[Row], dense: int) -> int:
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


def _images(trial: Trial, bench: RunContext, epoch: Row) -> int:
    """Images of one epoch: an incomplete last batch is left out, unless it is the only one."""
    setting, count = trial.setting, len(bench.data.train)
    if trial.method.startswith(SCRATCH):
        changes = setting.scratch
    else:
        changes = setting.retrain if epoch["phase"] == "retrain" else {}
    batch = bench.recipe(trial.seed, **changes).batch_size
    return count // batch * batch if count >= batch else count


Shares = float | Mapping[str, float]


@dataclass
class Afterwards:
    """What was done to a network: its epochs, and its cuts."""

    history: list[Row]
    plans: list[Plan]


def shares(trial: Trial) -> Shares:
    """The share to keep: as asked, the setting's, the paper's own for its own networks, else half."""
    if trial.keep is not None:
        return trial.keep
    return dict(trial.setting.shares) or keep_shares(trial.setting.model) or 0.5


def budget(trial: Trial) -> dict[str, Any]:
    """What `prune` is to be asked for: a share of the multiply-accumulates where the trial has one, else of filters."""
    return {"keep": shares(trial)} if trial.macs is None else {"macs": trial.macs}


def cut_and_retrain(trial: Trial, bench: RunContext, model: nn.Module) -> Afterwards:
    """Prune a trained network, in place, by the trial's method, and train it again.

    **Raises:** `Stopped` when the time is up; the same call goes on from the last epoch.
    """
    setting = trial.setting
    rounds: Sequence[dict[str, Any]] = [budget(trial)]
    if trial.strategy == "iterative":
        if trial.macs is not None:
            raise ConfigError(f"{trial.method}: cutting layer after layer needs shares of the filters, not of the MACs")
        parts = _rounds(model, bench, shares(trial), max(1, setting.retrain_epochs))
        rounds = [{"keep": part} for part in parts]
    done = Afterwards([], [])
    for number, part in enumerate(rounds):
        result = prune(
            model,
            bench.example,
            criterion=cast(str, trial.criterion),
            **part,
            round_to=setting.round_to,
            loader=bench.loader(trial.seed),
            scoring=Scoring(
                order="greedy" if trial.strategy == "greedy" else "independent",
                follow=cast(Literal["shortcut"] | None, setting.follow),
                seed=trial.seed,
            ),
        )
        done.plans.append(result.plan)
        epochs = _portion(setting.retrain_epochs, number, len(rounds))
        if epochs:
            name = "retraining.safetensors" if len(rounds) == 1 else f"retraining-{number}.safetensors"
            done.history += _retrain(trial, bench, model, epochs, name, len(done.history))
    return done


def scratch(trial: Trial, bench: RunContext, epochs: int | None = None) -> tuple[nn.Module, Afterwards]:
    """The small network from fresh weights: as wide as the pruned one, trained as the dense one is.

    The units that stay are drawn at random from the freshly drawn ones, so no weight is better than chance.

    **Arguments:** `epochs`: instead of the recipe's.
    """
    assert trial.plain in (SCRATCH, SCRATCH_LONG)
    model = bench.build(trial.seed)
    result = drawn(trial, bench, model, budget(trial))
    recipe = bench.recipe(trial.seed, **trial.setting.scratch)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    with bench.tracked(trial.id) as trackers:
        rows = train(
            model,
            bench.data,
            recipe,
            observers=[tracker.row for tracker in trackers],
            checkpoint=bench.work(trial.id) / "training.safetensors",
            check=bench.deadline.check_next,
            device=bench.device,
        )
    return model, Afterwards(rows.rows, [result.plan])


def drawn(trial: Trial, bench: RunContext, model: nn.Module, asked: Mapping[str, Any]) -> PruneResult:
    """Shrink a network with fresh weights; any filters are as good as others."""
    scoring = Scoring(seed=trial.seed)
    return prune(model, bench.example, criterion="random", round_to=trial.setting.round_to, scoring=scoring, **asked)


def _retrain(trial: Trial, bench: RunContext, model: nn.Module, epochs: int, checkpoint: str, before: int) -> list[Row]:
    setting = trial.setting
    usual: dict[str, Any] = {"lr": setting.retrain_lr, "schedule": "constant"}
    with bench.tracked(trial.id) as trackers:
        history = train(
            model,
            bench.data,
            bench.recipe(trial.seed, **{**usual, **setting.retrain, "epochs": epochs}),
            observers=[tracker.row for tracker in trackers],
            checkpoint=bench.work(trial.id) / checkpoint,
            check=bench.deadline.check_next,
            device=bench.device,
            phase="retrain",
        )
    return [{**row, "epoch": row["epoch"] + before} for row in history.rows]


def _portion(epochs: int, number: int, rounds: int) -> int:
    """The epochs of one of several rounds; together they are all.

    >>> [_portion(8, number, 3) for number in range(3)]
    [2, 3, 3]
    """
    return (number + 1) * epochs // rounds - number * epochs // rounds


def _rounds(model: nn.Module, bench: RunContext, keep: Shares, most: int) -> list[Shares]:
    """The groups to be cut, in the order of the network, in at most so many rounds of about as many groups each."""
    wanted = {}
    for group in trace(model, bench.example):
        if group.frozen is None:
            share = _share(keep, [group.name, *(part.tensor.rpartition(".")[0] for part in group.producers)])
            if share < 1:
                wanted[group.name] = share
    if not wanted:
        raise ConfigError("nothing would be cut: no channel group is asked to keep less than all its units")
    names, count = list(wanted), min(most, len(wanted))
    parts = [names[number * len(names) // count : (number + 1) * len(names) // count] for number in range(count)]
    return [{name: wanted[name] for name in part} for part in parts]


def _share(keep: Shares, names: Sequence[str]) -> float:
    """What a group with these layers is to keep: the last pattern that matches counts."""
    if not isinstance(keep, Mapping):
        return keep
    found = [share for pattern, share in keep.items() if any(fnmatchcase(name, pattern) for name in names)]
    return found[-1] if found else 1.0


def equal_epochs(trial: Trial, bench: RunContext) -> int:
    """Epochs of the small network that cost what the online schedule with the same budget costs.

    **Raises:** `ConfigError` for a schedule whose milestones are not known beforehand.
    """
    epochs = bench.recipe(trial.seed).epochs
    sizes = _sizes(trial, bench)
    return max(1, round(_online_cost(trial, sizes, epochs) / sizes[1.0]))


def longer_epochs(trial: Trial, bench: RunContext) -> int:
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


def _sizes(trial: Trial, bench: RunContext) -> dict[float, int]:
    """Share of the way to the budget → multiply-accumulates of the network that has gone so far."""
    full = measure(bench.build(trial.seed), bench.example).macs
    steps = {share for _, share in _schedule(trial, 100).milestones} | {0.0, 1.0}
    return {share: full if share == 0 else _size(trial, bench, full, share) for share in sorted(steps)}


def _size(trial: Trial, bench: RunContext, full: int, share: float) -> int:
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
