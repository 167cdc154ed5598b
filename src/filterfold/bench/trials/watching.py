"""How far a comparison is, from its run folder alone: no process at work is asked, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ...errors import RecordError
from . import records
from .config import Setting, Trial, description
from .locks import is_held

Status = Literal["running", "interrupted", "failed", "finished", "waiting"]


STATUSES: tuple[Status, ...] = ("running", "interrupted", "failed", "finished", "waiting")


@dataclass(frozen=True, slots=True)
class Standing:
    """How far one trial is.

    **Arguments:**

    - `label`, `seed`: of the trial.
    - `status`: `running`: a process on this machine is at it; `interrupted`: begun, but nobody is at it.
    - `phase`, `epoch`, `epochs`: where training is, or None where no epoch is over.
    - `loss`: mean training loss of the last epoch.
    - `top1`: percent; of the test images when finished, before that of the validation images.
    - `macs`: of the present network, an image.
    - `seconds`: of training so far.
    - `note`: why it failed, or the last cut.
    """

    label: str
    seed: int
    status: Status
    phase: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    top1: float | None = None
    macs: int | None = None
    seconds: float | None = None
    note: str = ""


def standings(folder: Path) -> list[Standing]:
    """Every trial of a run folder: those at work first, then by status, each in the order of tables.

    **Raises:** `RecordError` if the folder holds no comparison.
    """
    folder = Path(folder)
    found = description(folder)
    setting = Setting(**found["setting"])
    trials = [Trial(setting=setting, **budget) for budget in found["trials"].values()]
    ordered = sorted(trials, key=lambda trial: records.order(trial.to_dict()))
    return sorted((_standing(trial, folder) for trial in ordered), key=lambda one: STATUSES.index(one.status))


def _standing(trial: Trial, folder: Path) -> Standing:
    path = folder / records.FOLDER / f"{trial.id}.json"
    working = is_held(folder / ".locks" / trial.id)
    record = _record(path)
    if record is not None and record["status"] == "finished" and record["result"] is not None:
        rows, result = record["history"], record["result"]
        return _with_rows(
            trial,
            "finished",
            rows,
            {"top1": result["top1"], "macs": result["macs"], "seconds": result["train_seconds"]},
        )
    rows, epochs = _begun(trial, folder, working)
    if record is not None and not working:
        return _with_rows(trial, "failed", rows, {"note": record["reason"] or "", "epochs": epochs})
    begun = bool(rows)
    status: Status = "running" if working else "interrupted" if begun else "waiting"
    return _with_rows(trial, status, rows, {"epochs": epochs})


def _record(path: Path) -> records.Record | None:
    try:
        return records.read(path) if path.exists() else None
    except RecordError:  # removed meanwhile
        return None


def _begun(trial: Trial, folder: Path, working: bool) -> tuple[list[Any], int | None]:
    """Epochs that are over, and how many there are to be, from the newest checkpoint.

    A working trial without one may be training the dense network that it begins with.
    """
    places = [folder / "work" / trial.id] + ([folder / "work" / trial.base.id] if working else [])
    for place in places:
        for path in sorted(place.glob("*.safetensors"), key=_written, reverse=True):
            header = _header(path)
            if header is not None:
                return header["history"], header["identity"]["recipe"]["epochs"]
    return [], None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _header(path: Path) -> dict[str, Any] | None:
    """The plain values of a training checkpoint: no tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])
        return tree if isinstance(tree["history"], list) and tree["identity"]["recipe"]["epochs"] else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None  # removed meanwhile, or of another version: nothing to show


def _with_rows(trial: Trial, status: Status, rows: list[Any], known: Mapping[str, Any]) -> Standing:
    last = rows[-1] if rows else None
    from_rows: dict[str, Any] = {}
    if last is not None:
        from_rows = {
            "phase": last["phase"],
            "epoch": last["epoch"],
            "loss": last["train_loss"],
            "top1": last["validation_top1"],
            "macs": last["macs"],
            "seconds": sum(row["seconds"] for row in rows),
            "note": next((row["events"][-1] for row in reversed(rows) if row["events"]), ""),
        }
    return Standing(trial.label, trial.seed, status, **{**from_rows, **known})
