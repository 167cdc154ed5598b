"""The methods, one function each: from the first weights to the final network.

Every method begins with the weights of the setting, `scratch` excepted; without any, they are drawn. What is drawn, and
every random choice, comes from the trial's seed, so trials of one seed are paired: they start from the same weights and
see the same batches. The dense network that several trials begin with is trained once and kept;
its training counts in full for each of them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from ...errors import ConfigError, RecordError
from ...graph import trace
from ...online import ClusterRow, Distillation, DistillationCallback, OnlineCallback, OnlineFilterClustering
from ...plan import Plan
from ...pruning.budgets.patterns import by_group
from ...pruning.budgets.solver import Scope
from ...pruning.criteria.registry import resolve
from ...pruning.prune import prune
from ...pruning.reconstruction import repair
from ...pruning.scored import Scoring
from ...surgery.checkpoint import load, save
from ...training import Row
from ...utils.io import write_json
from .config import Trial
from .context import RunContext
from .costs import budget, paid_epochs, shares, shrink


@dataclass
class Trained:
    """What a method came to: the final network, and how it got there."""

    model: nn.Module
    history: list[Row]
    plans: Sequence[Plan] = ()
    clusters: list[ClusterRow] = field(default_factory=list)


def train_by_method(trial: Trial, context: RunContext) -> Trained:
    """Train, and cut, as the trial's method does.

    **Raises:** `Stopped` when the time is up; the same call goes on from the last epoch.
    """
    run = {"dense": dense, "one-shot": one_shot, "scratch": scratch, "online": online}[trial.parsed.kind]
    return run(trial, context)


def dense(trial: Trial, context: RunContext) -> Trained:
    """Cut nothing; `dense-long`: train for as many epochs as training and retraining together, in one schedule."""
    if not trial.parsed.long:
        return base(trial, context)
    model = context.build(trial.seed)
    epochs = context.recipe(trial).epochs + trial.setting.retrain_epochs
    return Trained(model, context.train(trial, model, epochs=epochs))


def one_shot(trial: Trial, context: RunContext) -> Trained:
    """The original algorithm (Li et al. 2017, §3): begin with the dense network, cut it, retrain.

    `iterative` cuts and retrains in several rounds, some layers in each; `+repair` solves the next layers' kernels anew
    after each cut. Under a budget of the MACs, criteria whose scores compare across layers choose the widths.
    """
    trained = base(trial, context)
    context.deadline.check()
    setting, method, model = trial.setting, trial.parsed, trained.model
    criterion = cast(str, method.criterion)
    scope: Scope = "global" if trial.macs is not None and resolve(criterion).across_layers else "layer"
    taught = teachers(trial, context, model)
    rounds = _rounds(trial, context, model) if method.strategy == "iterative" else [budget(trial)]
    history: list[Row] = []
    plans: list[Plan] = []
    for number, part in enumerate(rounds):
        before = copy.deepcopy(model) if "repair" in method.additions else None
        result = prune(
            model,
            context.example,
            criterion=criterion,
            **part,
            scope=scope,
            round_to=setting.round_to,
            loader=context.loader(trial.seed),
            scoring=Scoring(
                order="greedy" if method.strategy == "greedy" else "independent",
                follow=cast(Literal["shortcut"] | None, setting.follow),
                seed=trial.seed,
            ),
        )
        plans.append(result.plan)
        if before is not None:
            repair(model, before, result.plan, context.loader(trial.seed))
        epochs = _portion(setting.retrain_epochs, number, len(rounds))
        if epochs:
            recipe = {"lr": setting.retrain_lr, "schedule": "constant", **setting.retrain, "epochs": epochs}
            name = "retraining" if len(rounds) == 1 else f"retraining-{number}"
            rows = context.train(trial, model, checkpoint=name, phase="retrain", callbacks=taught, **recipe)
            so_far = len(history)
            history += [{**row, "epoch": row["epoch"] + so_far} for row in rows]
    return Trained(model, trained.history + history, plans)


def scratch(trial: Trial, context: RunContext) -> Trained:
    """The small network from fresh weights: as wide as the pruned one, trained as the dense one is.

    The units that stay are drawn at random from the freshly drawn ones, so no weight is better than chance.
    """
    recipe = {**trial.setting.scratch, **paid_epochs(trial, context)}
    model = context.fresh(trial.seed)
    plan = shrink(trial, context, model, budget(trial)).plan
    history = context.train(trial, model, callbacks=teachers(trial, context, model), **recipe)
    return Trained(model, history, [plan])


def online(trial: Trial, context: RunContext) -> Trained:
    """Cut while training; the epochs are those of dense training, if not `+longer`, and nothing follows."""
    recipe = paid_epochs(trial, context)
    reads_data = trial.parsed.criterion or trial.parsed.additions
    callback = online_callback(trial, context.loader(trial.seed) if reads_data else None)
    model = context.build(trial.seed)
    if trial.epochs == 0:
        untrained = OnlineFilterClustering(model, context.example, **callback.options)
        untrained.cluster_and_prune()
        return Trained(model, [], tuple(untrained.plans), untrained.history)
    history = context.train(trial, model, callbacks=(callback, *teachers(trial, context, model)), **recipe)
    assert callback.online is not None
    return Trained(model, history, tuple(callback.online.plans), callback.history)


def online_callback(trial: Trial, loader: Sequence[Any] | None = None) -> OnlineCallback:
    """What cuts while an online method trains.

    **Raises:** `ConfigError` for options that make no sense.
    """
    try:
        return OnlineCallback(
            clusters=trial.clusters,
            keep=trial.keep,
            macs=trial.macs,
            round_to=trial.setting.round_to,
            method=trial.parsed.criterion or "fold",
            seed=trial.seed,
            loader=loader,
            **trial.online_options,
        )
    except TypeError as error:
        raise ConfigError(f"online clustering has an option that this version does not know: {error}") from error


def teachers(trial: Trial, context: RunContext, network: nn.Module) -> tuple[DistillationCallback, ...]:
    """The teacher of a trial with `+distill`: of the setting's file, or this network as it is now.

    None where there is no teacher, or `OnlineCallback` makes it at the first cut.

    **Raises:** `ConfigError` for a weight or temperature that makes no sense; what `RunContext.teacher` raises.
    """
    if not trial.parsed.is_taught or trial.teacher == "before the first cut":
        return ()
    how = {name: value for name, value in trial.setting.distill.items() if name in ("weight", "temperature")}
    return (
        DistillationCallback(Distillation(context.teacher() if trial.teacher == "file" else network, **how).to("cpu")),
    )


def base(trial: Trial, context: RunContext) -> Trained:
    """The dense network of the trial's seed: trained already, from an earlier trial, or trained now and kept."""
    trial = trial.base
    model = context.build(trial.seed)
    if trial.setting.begins.given and not trial.setting.begins.tune:
        return Trained(model, [])
    about, weights = (context.base_file(trial.id, suffix) for suffix in (".json", ".safetensors"))
    with context.locked(f"base-{trial.id}"):  # trials of one seed may run at the same time
        if about.exists():
            try:
                history = json.loads(about.read_text(encoding="utf-8"))["history"]
            except (ValueError, KeyError, OSError) as error:
                raise RecordError(f"{about}: damaged ({error}); delete it, and the network is trained again") from error
            return Trained(load(weights, lambda: model, device=context.device), history)
        history = context.train(trial, model)
        save(model, weights)
        write_json(about, {"history": history})
        shutil.rmtree(context.work(trial.id), ignore_errors=True)
    return Trained(model, history)


def needed_base(trial: Trial, context: RunContext) -> str | None:
    """The id of the dense training that a trial would have to do first, or None: it uses none, or there is one."""
    method = trial.parsed
    start = trial.setting.begins
    if method.kind not in ("dense", "one-shot") or method.long or (start.given and not start.tune):
        return None
    name = trial.base.id
    return None if context.base_file(name, ".json").exists() else name


def must_wait(trial: Trial, context: RunContext) -> bool:
    """Whether a trial begins with a dense network that another process is training right now."""
    name = needed_base(trial, context)
    return name is not None and context.is_locked(f"base-{name}")


def _portion(epochs: int, number: int, rounds: int) -> int:
    """The epochs of one of several rounds; together they are all.

    >>> [_portion(8, number, 3) for number in range(3)]
    [2, 3, 3]
    """
    return (number + 1) * epochs // rounds - number * epochs // rounds


def _rounds(trial: Trial, context: RunContext, model: nn.Module) -> list[dict[str, Any]]:
    """Budgets for several rounds, about as many groups in each, in the order of the network; a round has an epoch."""
    if trial.macs is not None:
        raise ConfigError(f"{trial.method}: cutting layer after layer needs shares of the filters, not of the MACs")
    groups = [group for group in trace(model, context.example) if group.frozen is None]
    asked = by_group(groups, "keep", shares(trial))
    wanted = {group.name: asked[group.name] for group in groups if asked.get(group.name, 1.0) < 1}
    if not wanted:
        raise ConfigError("nothing would be cut: no channel group is asked to keep less than all its units")
    names, count = list(wanted), min(max(1, trial.setting.retrain_epochs), len(wanted))
    parts = [names[number * len(names) // count : (number + 1) * len(names) // count] for number in range(count)]
    return [{"keep": {name: wanted[name] for name in part}} for part in parts]
