"""One trial: from fresh weights to a record.

Three ways lead there. `dense` trains (`dense-long`: longer). A criterion's name (`l1`: the original algorithm, Li et
al. 2017, §3) begins with the dense network of the same seed, cuts it in one shot, and trains on at a constant learning
rate. `online…` cuts while it trains and is done when training is.

Initial weights and every random choice come from the trial's seed, so trials of one seed are paired: they start from
the same weights and see the same batches. The dense network that several trials begin with is trained once and kept;
its training counts in full for each of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from torch import nn

from ...errors import ConfigError, RecordError
from ...online import OnlineCallback
from ...plan import Plan
from ...profiling.macs import Cost, measure
from ...surgery.checkpoint import load, load_weights, save
from ...training import Row, evaluate, train
from ...utils.environment import describe
from ...utils.io import write_json
from . import records
from .config import DENSE, DENSE_LONG, DISTILL, PULLS, SCRATCH, SCRATCH_LONG, Trial
from .context import RunContext
from .locks import held
from .methods import cut_and_retrain, equal_epochs, longer_epochs, scratch, train_images, train_macs
from .records import ClusterUpdate, Dense, Record, Result
from .timing import measure_alone


@dataclass
class Trained:
    """What a way of training came to: the final network, and how it got there."""

    model: nn.Module
    history: list[Row]
    plans: Sequence[Plan] = ()
    clusters: list[ClusterUpdate] = field(default_factory=list)


def run_trial(trial: Trial, bench: RunContext, *, command: str | None = None) -> Record:
    """Train, evaluate on the test set, time, save the network, and say it all in a record.

    A trial that was interrupted goes on from its last epoch.

    **Arguments:**

    - `bench`: data, device, run folder and clock; its setting is the trial's.
    - `command`: what to note as the way to redo this.

    **Raises:** `Stopped` when the time is up, with everything saved; whatever makes the trial fail.
    """
    started = now()
    if trial.method == DENSE:
        trained = _base(trial, bench)
    elif trial.method == DENSE_LONG:
        trained = _long(trial, bench)
    elif trial.is_online:
        trained = _online(trial, bench)
    elif trial.plain in (SCRATCH, SCRATCH_LONG):
        small, done = scratch(trial, bench, _epochs(trial, bench))
        trained = Trained(small, done.history, done.plans)
    else:
        trained = _one_shot(trial, bench)
    final, dense = measure(trained.model, bench.example), measure(bench.build(trial.seed), bench.example)
    metrics = evaluate(trained.model, bench.data.test, device=bench.device, classes=len(bench.data.classes))
    timing = measure_alone(trained.model, bench)
    with bench.tracked(trial.id) as trackers:
        for tracker in trackers:
            tracker.final({"top1": metrics.top1, "top5": metrics.top5, "macs": final.macs, "weights": final.weights})
    about = {"trial": json.dumps(trial.to_dict(), sort_keys=True)}
    save(trained.model, bench.model_file(trial.id), plan=tuple(trained.plans), metadata=about)
    return Record(
        format=records.FORMAT,
        id=trial.id,
        status="finished",
        reason=None,
        **trial.to_dict(),
        result=Result(
            top1=metrics.top1,
            top5=metrics.top5,
            inference_seconds=timing["rounds"][0],
            macs=final.macs,
            parameters=final.parameters,
            weights=final.weights,
            train_seconds=sum(epoch["seconds"] for epoch in trained.history),
            train_images=train_images(trial, bench, trained.history),
            train_macs=train_macs(trial, bench, trained.history, dense.macs),
            best_top1=_best(trained.history, final),
            widths=_widths(trained.plans),
        ),
        dense=Dense(macs=dense.macs, parameters=dense.parameters, weights=dense.weights),
        history=trained.history,
        clusters_history=trained.clusters,
        timing=timing,
        environment=describe(bench.device),
        command=command,
        started=started,
        finished=now(),
    )


def check(trials: Iterable[Trial], bench: RunContext) -> None:
    """Find out now what would make trials fail before they have begun.

    **Raises:** the `FilterfoldError` that says so.
    """
    for trial in trials:
        if trial.is_online:
            _callback(trial)
    bench.check()


def forget(trial: Trial, bench: RunContext) -> None:
    """Remove what a trial kept for the case of an interruption."""
    shutil.rmtree(bench.work(trial.id), ignore_errors=True)


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _base(trial: Trial, bench: RunContext) -> Trained:
    """The dense network of the trial's seed: taken from where an earlier trial left it, or trained."""
    base = trial.base
    if trial.setting.weights is not None:
        model = bench.build(trial.seed)
        load_weights(model, trial.setting.weights)
        return Trained(model, [])
    with held(bench.lock(f"base-{base.id}"), bench.deadline.check):  # trials of one seed may run at the same time
        return _common(base, bench)


def _common(base: Trial, bench: RunContext) -> Trained:
    """The dense network of a seed: read, or trained and kept."""
    about = bench.base_file(base.id, ".json")
    weights = bench.base_file(base.id, ".safetensors")
    if about.exists():
        try:
            history = json.loads(about.read_text(encoding="utf-8"))["history"]
        except (ValueError, KeyError, OSError) as error:
            raise RecordError(f"{about}: damaged ({error}); delete it, and the network is trained again") from error
        return Trained(load(weights, lambda: bench.build(base.seed), device=bench.device), history)
    model = bench.build(base.seed)
    with bench.tracked(base.id) as trackers:
        trained = train(
            model,
            bench.data,
            bench.recipe(base.seed),
            observers=[tracker.row for tracker in trackers],
            checkpoint=bench.work(base.id) / "training.safetensors",
            check=bench.deadline.check_next,
            device=bench.device,
        )
    history = trained.rows
    save(model, weights)
    write_json(about, {"history": history})
    forget(base, bench)
    return Trained(model, history)


def _long(trial: Trial, bench: RunContext) -> Trained:
    """The dense network, trained as long as one that is trained, cut and trained again; the schedule is stretched."""
    setting, model = trial.setting, bench.build(trial.seed)
    with bench.tracked(trial.id) as trackers:
        history = train(
            model,
            bench.data,
            bench.recipe(trial.seed, epochs=bench.recipe(trial.seed).epochs + setting.retrain_epochs),
            observers=[tracker.row for tracker in trackers],
            checkpoint=bench.work(trial.id) / "training.safetensors",
            check=bench.deadline.check_next,
            device=bench.device,
        )
    return Trained(model, history.rows)


def _one_shot(trial: Trial, bench: RunContext) -> Trained:
    """The original algorithm: train, rank filters, cut once, retrain."""
    base = _base(trial, bench)
    bench.deadline.check()
    done = cut_and_retrain(trial, bench, base.model)
    return Trained(base.model, base.history + done.history, done.plans)


def _online(trial: Trial, bench: RunContext) -> Trained:
    """Cut while training; the epochs are those of dense training, if not `+longer`, and nothing follows."""
    epochs = _epochs(trial, bench)
    callback = _callback(trial, bench.loader(trial.seed) if trial.criterion or trial.additions else None)
    model = bench.build(trial.seed)
    with bench.tracked(trial.id) as trackers:
        history = train(
            model,
            bench.data,
            bench.recipe(trial.seed) if epochs is None else bench.recipe(trial.seed, epochs=epochs),
            callbacks=(callback,),
            observers=[tracker.row for tracker in trackers],
            checkpoint=bench.work(trial.id) / "training.safetensors",
            check=bench.deadline.check_next,
            device=bench.device,
        )
    online = callback.online
    assert online is not None
    found = [ClusterUpdate(**row) for row in online.history]
    return Trained(model, history.rows, tuple(online.plans), found)


def _epochs(trial: Trial, bench: RunContext) -> int | None:
    """The epochs of a trial whose training is as long as it may cost, or None: the recipe's."""
    if "longer" in trial.additions:
        return longer_epochs(trial, bench)
    return equal_epochs(trial, bench) if trial.plain == SCRATCH_LONG else None


def _callback(trial: Trial, loader: Sequence[Any] | None = None) -> OnlineCallback:
    added: dict[str, Any] = {"schedule": trial.schedule}
    if "repair" in trial.additions:
        added["remedy"] = "kernels"
    if "distill" in trial.additions:
        added["distill"] = DISTILL
    for name in trial.additions:
        added |= PULLS.get(name, {})
    try:
        return OnlineCallback(
            clusters=trial.clusters,
            keep=trial.keep,
            macs=trial.macs,
            round_to=trial.setting.round_to,
            method=trial.criterion or "fold",
            seed=trial.seed,
            loader=loader,
            **{**trial.setting.online, **added},
        )
    except TypeError as error:
        raise ConfigError(f"online clustering has an option that this version does not know: {error}") from error


def _widths(plans: Sequence[Plan]) -> dict[str, list[int]]:
    """Group → units before the first and after the last cut."""
    widths: dict[str, list[int]] = {}
    for plan in plans:
        for group, (before, after) in plan.widths.items():
            widths.setdefault(group, [before, after])[1] = after
    return widths


def _best(history: Sequence[Mapping[str, Any]], final: Cost) -> float | None:
    """Best validation top-1 among the epochs that ended with the final network's size."""
    found = [row["validation_top1"] for row in history if row["macs"] == final.macs]
    return max((top1 for top1 in found if top1 is not None), default=None)
