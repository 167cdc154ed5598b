"""The record: what one trial came to, in one JSON file, with everything needed to redo it; and how far a run is.

A run folder holds `records/<trial id>.json`, one file a trial, written atomically: a record is there as a whole
or not at all. Whoever reads results (tables, statistics, plots) reads these files and nothing else. The
`TypedDict`s below are the schema; a later version of it carries a higher `format`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from safetensors import SafetensorError, safe_open

from ...errors import RecordError
from ...online import ClusterRow
from ...training import Row
from ...utils.io import write_json
from .config import Described, Trial, description
from .context import is_locked
from .setting import Setting

FORMAT = 1


FOLDER = "records"


Status = Literal["finished", "failed"]


class Result(TypedDict):
    """The figures of a finished trial.

    - `top1`, `top5`: percent of the test set, final weights of the last epoch (nothing is selected on test).
    - `inference_seconds`: seconds for the whole test set at batch 128, data already on the device. Median over the
      rounds of the timing pass, see `Timing`.
    - `macs`, `weights`, `parameters`: multiply-accumulates an image; convolution and linear weights; all parameters.
    - `train_seconds`: training from the first to the last epoch, validation left out. For a trial that begins with
      a trained network (`l1` and other criteria) it includes that network's training.
    - `train_images`, `train_macs`: images that training saw in all those epochs, and multiply-accumulates of its steps
      (see `costs`). The first records did not have them yet.
    - `best_top1`: best validation top-1 over the epochs, or None without a validation split.
    - `widths`: channel group → [units before, units after].
    """

    top1: float
    top5: float
    inference_seconds: float | None
    macs: int
    parameters: int
    weights: int
    train_seconds: float
    train_images: NotRequired[int]
    train_macs: NotRequired[int]
    best_top1: float | None
    widths: dict[str, list[int]]


class Dense(TypedDict):
    """The cost of the network before anything was cut, per image."""

    macs: int
    parameters: int
    weights: int


class Timing(TypedDict):
    """How `inference_seconds` was measured.

    `mode` is `alone` (by the trial itself, right after training) or `together` (all networks of the comparison,
    interleaved round by round in one process: the one to compare). `rounds` are the seconds of each round;
    `together_with` fingerprints the set of trials that were measured together; `control` is the ratio of one network's
    times to its own, taken in the same rounds under another name: 1.00 but for noise.

    What the first records did not have yet: `batches`: images a call → seconds a
    call in each round; `controls`: the same → the control's ratio; `asked`: the batch sizes that were asked for;
    `wasted`: layers whose widths save nothing, a sentence each, found in one network of each label.
    """

    mode: Literal["alone", "together"]
    rounds: list[float]
    batch_size: int
    device: str
    processor: str
    threads: int
    together_with: str | None
    control: float | None
    batches: NotRequired[dict[str, list[float]]]
    controls: NotRequired[dict[str, float]]
    asked: NotRequired[list[int]]
    wasted: NotRequired[list[str]]


class _Later(TypedDict, total=False):
    images: str


class Record(Described, _Later):
    """One trial.

    - `method`, `label`, `clusters`, `model`, `data`, `seed`, `options`: the trial, enough to redo it
      (`Trial.from_dict`). Trials of one label differ by the seed only.
    - `id`: the trial's name, made from the above. `reason` says why a failed one failed.
    - `images`: fingerprint of the data set's pixels and labels; the first records did not have it yet.
    """

    format: int
    id: str
    status: Status
    reason: str | None
    result: Result | None
    dense: Dense | None
    history: list[Row]
    clusters_history: list[ClusterRow]
    timing: Timing | None
    environment: dict[str, Any]
    command: str | None
    started: str
    finished: str


def record_file(folder: Path, trial_id: str) -> Path:
    """Where the record of a trial lies in a run folder."""
    return Path(folder) / FOLDER / f"{trial_id}.json"


def write(folder: Path, record: Record) -> Path:
    """Write one record to its place in a run folder, atomically; an older record of the same trial is replaced."""
    path = record_file(folder, record["id"])
    write_json(path, record)
    return path


def read(path: Path) -> Record:
    """Read one record.

    **Raises:** `RecordError` naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such record") from None
    except (ValueError, OSError) as error:
        raise RecordError(f"{path}: not a whole record ({error}); delete it, and its trial is run again") from error
    if not isinstance(document, dict) or "format" not in document:
        raise RecordError(f"{path}: not one of Filterfold's records")
    if document["format"] != FORMAT:
        raise RecordError(f"{path}: record format {document['format']!r} is not {FORMAT}: written by another version?")
    missing = sorted(Record.__required_keys__ - document.keys())
    if missing:
        raise RecordError(f"{path}: the record lacks {', '.join(missing)}; delete it, and its trial is run again")
    if document["status"] == "finished" and not document["result"]:
        raise RecordError(f"{path}: a finished record without a result; delete it, and its trial is run again")
    return cast(Record, document)


def read_all(folder: Path) -> list[Record]:
    """All records of a run folder, in the order method, clusters, seed (dense first).

    **Arguments:**

    - `folder`: a run folder (with `records/` in it), the `records` folder itself, or one record's file.

    **Raises:** `RecordError` if there is no record there.
    """
    folder = Path(folder)
    if folder.is_file():
        return [read(folder)]
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such run folder")
    inner = folder / FOLDER
    paths = sorted((inner if inner.is_dir() else folder).glob("*.json"))
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise RecordError(f"{folder}: no record of a trial there; `filterfold compare --out {folder}` makes some")
    return sorted(map(read, paths), key=order)


def finished(records: Iterable[Record]) -> dict[str, Record]:
    """Trial id → record, of the trials that need not be run again."""
    return {record["id"]: record for record in records if record["status"] == "finished"}


def rank(method: str) -> int:
    """Where a method stands in tables: dense, the original algorithm, then the others, online last."""
    known = {"dense": 0, "dense-long": 1, "l1": 2}
    return known.get(method, 4 if method.startswith("online") else 3)


def order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key of a record: method, clusters, label, seed."""
    return (rank(record["method"]), record["method"], record["clusters"] or 0, record["label"], record["seed"])


State = Literal["running", "interrupted", "failed", "finished", "waiting"]


STATES: tuple[State, ...] = ("running", "interrupted", "failed", "finished", "waiting")


@dataclass(frozen=True, slots=True)
class TrialStatus:
    """How far one trial is.

    **Arguments:**

    - `label`, `seed`: of the trial.
    - `state`: `running`: a process on this machine works on it; `interrupted`: begun, but no process works on it.
    - `phase`, `epoch`, `epochs`: where training is, or None where no epoch is over.
    - `loss`: mean training loss of the last epoch.
    - `top1`: percent; of the test images when finished, before that of the validation images.
    - `macs`: of the present network, an image.
    - `seconds`: of training so far.
    - `note`: why it failed, or the last cut.
    """

    label: str
    seed: int
    state: State
    phase: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    top1: float | None = None
    macs: int | None = None
    seconds: float | None = None
    note: str = ""


def statuses(folder: Path) -> list[TrialStatus]:
    """How far every trial of a run folder is: those at work first, then by state, each in the order of tables.

    It is read from the folder alone: no process is asked, and nothing is changed.

    **Raises:** `RecordError` if the folder holds no comparison.
    """
    folder = Path(folder)
    found = description(folder)
    setting = Setting(**found["setting"])
    trials = [Trial(setting=setting, **budget) for budget in found["trials"].values()]
    ordered = sorted(trials, key=lambda trial: order(trial.to_dict()))
    return sorted((_status(trial, folder) for trial in ordered), key=lambda one: STATES.index(one.state))


def _status(trial: Trial, folder: Path) -> TrialStatus:
    working = is_locked(folder, trial.id)
    try:
        record = read(record_file(folder, trial.id))
    except RecordError:  # none yet, or removed meanwhile
        record = None
    if record is not None and record["status"] == "finished" and (result := record["result"]) is not None:
        figures = {"top1": result["top1"], "macs": result["macs"], "seconds": result["train_seconds"]}
        return TrialStatus(trial.label, trial.seed, "finished", **{**_last_epoch(record["history"]), **figures})
    rows, epochs = _checkpoint(trial, folder, working)
    known = {**_last_epoch(rows), "epochs": epochs}
    if record is not None and not working:
        return TrialStatus(trial.label, trial.seed, "failed", **{**known, "note": record["reason"] or ""})
    state: State = "running" if working else "interrupted" if rows else "waiting"
    return TrialStatus(trial.label, trial.seed, state, **known)


def _checkpoint(trial: Trial, folder: Path, working: bool) -> tuple[list[Row], int | None]:
    """Epochs that are over, and how many there are to be, from the newest checkpoint.

    A working trial without one may be training the dense network that it begins with.
    """
    places = [folder / "work" / trial.id] + ([folder / "work" / trial.base.id] if working else [])
    for place in places:
        for path in sorted(place.glob("*.safetensors"), key=_written, reverse=True):
            try:
                with safe_open(path, framework="pt") as file:  # the header only: no tensor is read
                    tree = json.loads((file.metadata() or {})["tree"])
                return list(tree["history"]), int(tree["identity"]["recipe"]["epochs"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                continue  # removed meanwhile, or of another version: nothing to show
    return [], None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _last_epoch(rows: Sequence[Row]) -> dict[str, Any]:
    """What the epochs tell of a `TrialStatus`."""
    if not rows:
        return {}
    last = rows[-1]
    return {
        "phase": last["phase"],
        "epoch": last["epoch"],
        "loss": last["train_loss"],
        "top1": last["validation_top1"],
        "macs": last["macs"],
        "seconds": sum(row["seconds"] for row in rows),
        "note": next((row["events"][-1] for row in reversed(rows) if row["events"]), ""),
    }
