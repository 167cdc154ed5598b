"""One trial: from fresh weights to a record."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from ...errors import ConfigError, FilterfoldError, one_line
from ...plan import Plan
from ...profiling.macs import Cost, measure
from ...surgery.checkpoint import save
from ...training import evaluate
from ...utils.environment import describe
from . import records
from .config import Trial
from .context import RunContext
from .costs import train_images, train_macs
from .methods import online_callback, teachers, train_by_method
from .records import Dense, Record, Result
from .start import input_of, network_of
from .timing import measure_alone


def run_trial(trial: Trial, context: RunContext, *, command: str | None = None) -> Record:
    """Train, evaluate on the test set, time, save the network, and say it all in a record.

    A trial that was interrupted goes on from its last epoch.

    **Arguments:**

    - `context`: its setting is the trial's.
    - `command`: what to note as the way to redo this.

    **Raises:** `Stopped` when the time is up, with everything saved; whatever makes the trial fail.
    """
    started = now()
    trained = train_by_method(trial, context)
    final, dense = measure(trained.model, context.example), measure(context.build(trial.seed), context.example)
    metrics = evaluate(trained.model, context.data.test, device=context.device, classes=len(context.data.classes))
    timing = measure_alone(trained.model, context) if context.timing else None
    with context.tracked(trial) as trackers:
        for tracker in trackers:
            tracker.final({"top1": metrics.top1, "top5": metrics.top5, "macs": final.macs, "weights": final.weights})
    about = {
        "trial": json.dumps(trial.to_dict(), sort_keys=True),
        "input": input_of(context.data, trial.setting.data_options),
        **network_of(trial.setting.model, trial.setting.width, context.data),
    }
    save(trained.model, context.model_file(trial.id), plan=tuple(trained.plans), metadata=about)
    result = Result(
        top1=metrics.top1,
        top5=metrics.top5,
        inference_seconds=timing["rounds"][0] if timing else None,
        macs=final.macs,
        parameters=final.parameters,
        weights=final.weights,
        train_seconds=sum(epoch["seconds"] for epoch in trained.history),
        train_images=train_images(trial, context, trained.history),
        train_macs=train_macs(trial, context, trained.history, dense.macs),
        best_top1=_best(trained.history, final),
        widths=_widths(trained.plans),
    )
    record = _unfinished(trial, context.device, command, started)
    record["status"], record["result"], record["timing"] = "finished", result, timing
    record["dense"] = Dense(macs=dense.macs, parameters=dense.parameters, weights=dense.weights)
    record["history"], record["clusters_history"] = trained.history, trained.clusters
    record["images"] = context.data.fingerprint
    return record


def failure(trial: Trial, error: Exception, device: str, command: str | None, started: str) -> Record:
    """The record of a trial that failed. An error that is none of Filterfold's is a bug: its traceback is kept."""
    record = _unfinished(trial, device, command, started)
    if isinstance(error, FilterfoldError):
        return {**record, "reason": (str(error).strip().splitlines() or [""])[0]}
    trace = "".join(traceback.format_exception(error))
    return {**record, "reason": one_line(error), "environment": record["environment"] | {"traceback": trace}}


def check(trials: Iterable[Trial], context: RunContext) -> None:
    """Find out now what would make trials fail before they have begun.

    **Raises:** the `FilterfoldError` that says so.
    """
    taught = False
    for trial in trials:
        if trial.parsed.is_online:
            online_callback(trial, ())
        if trial.parsed.is_taught and not taught:
            teachers(trial, context, context.build())
            taught = True
        if trial.parsed.kind == "scratch" and context.begins_smaller:
            raise ConfigError(
                f"method {trial.method!r}: {trial.setting.weights} is pruned already, and nothing builds a network of "
                "its size with fresh weights; leave that method out"
            )
    context.check()


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unfinished(trial: Trial, device: str, command: str | None, started: str) -> Record:
    """A record without an outcome yet."""
    about = dict(format=records.FORMAT, id=trial.id, status="failed", reason=None, **trial.to_dict())
    outcome: dict[str, Any] = {"result": None, "dense": None, "history": [], "clusters_history": [], "timing": None}
    where = {"environment": describe(device), "command": command, "started": started, "finished": now()}
    return cast(Record, {**about, **outcome, **where})


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
