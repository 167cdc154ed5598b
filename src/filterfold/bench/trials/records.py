"""The record: what one trial came to, in one JSON file, with everything that is needed to redo it.

A run folder holds `records/<trial id>.json`, one file a trial, written atomically: a record is there as a whole
or not at all. Whoever reads results (tables, statistics, plots) reads these files and nothing else. The
`TypedDict`s below are the schema; a later version of it carries a higher `format`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from ...errors import RecordError
from ...training import Row
from ...utils.io import write_json
from .config import Described

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
    inference_seconds: float
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


class ClusterUpdate(TypedDict):
    """One clustering of one group's filters: `changed` filters are in another cluster than before."""

    epoch: int
    group: str
    k: int
    inertia: float
    cosine: float
    changed: int


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


class Record(Described):
    """One trial.

    - `method`, `label`, `clusters`, `model`, `data`, `seed`, `options`: the trial, enough to redo it
      (`Trial.from_dict`). Trials of one label differ by the seed only.
    - `id`: the trial's name, made from the above. `reason` says why a failed one failed.
    """

    format: int
    id: str
    status: Status
    reason: str | None
    result: Result | None
    dense: Dense | None
    history: list[Row]
    clusters_history: list[ClusterUpdate]
    timing: Timing | None
    environment: dict[str, Any]
    command: str | None
    started: str
    finished: str


def write(folder: Path, record: Record) -> Path:
    """Write one record to its place in a run folder, atomically; an older record of the same trial is replaced."""
    path = Path(folder) / FOLDER / f"{record['id']}.json"
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
