"""What can follow dense training: cut once and retrain, cut layer by layer with retraining between, start afresh small.

The original algorithm (Li et al. 2017) in its variants, as parts of a method's name:

    l1              rank by a criterion, cut everything at once, retrain (section 3.2, "prune once and retrain")
    l1-greedy       the same, but the kernels of channels dropped further up don't count (section 3.2)
    l1-iterative    cut some layers, retrain, cut the next ones, … ("prune and retrain iteratively")
    scratch         the small network from fresh weights ("scratch-train")
    scratch-long    the same for more epochs: as many as the online method's multiply-accumulates pay for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from torch import nn

from ..errors import ConfigError
from ..graph import trace
from ..plan import Plan
from ..prune import PruneResult, prune
from ..training import Row, train
from .bench import Bench
from .config import SCRATCH, SCRATCH_LONG, Trial
from .li2017 import keep_shares

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


def cut_and_retrain(trial: Trial, bench: Bench, model: nn.Module) -> Afterwards:
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
            seed=trial.seed,
            follow=cast(Literal["shortcut"] | None, setting.follow),
            scoring="greedy" if trial.strategy == "greedy" else "independent",
        )
        done.plans.append(result.plan)
        epochs = _portion(setting.retrain_epochs, number, len(rounds))
        if epochs:
            name = "retraining.safetensors" if len(rounds) == 1 else f"retraining-{number}.safetensors"
            done.history += _retrain(trial, bench, model, epochs, name, len(done.history))
    return done


def scratch(trial: Trial, bench: Bench, epochs: int | None = None) -> tuple[nn.Module, Afterwards]:
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


def drawn(trial: Trial, bench: Bench, model: nn.Module, asked: Mapping[str, Any]) -> PruneResult:
    """Shrink a network with fresh weights; any filters are as good as others."""
    return prune(model, bench.example, criterion="random", round_to=trial.setting.round_to, seed=trial.seed, **asked)


def _retrain(trial: Trial, bench: Bench, model: nn.Module, epochs: int, checkpoint: str, before: int) -> list[Row]:
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


def _rounds(model: nn.Module, bench: Bench, keep: Shares, most: int) -> list[Shares]:
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
