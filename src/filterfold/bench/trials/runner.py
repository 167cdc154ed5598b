"""Running many trials: those that have no record yet, one after the other, until all are done or the time is up.

A run folder:

    comparison.json          what is compared
    records/<trial>.json     one record for each trial that ended
    models/<trial>.safetensors  its final network
    bases/<trial>.*          dense networks that trials of the same seed begin with
    work/<trial>/            training checkpoints of trials that have not ended; removed with them

Nothing here depends on what ran before in the same process, so a comparison that was killed goes on with the same
numbers. An `Engine` decides where trials run; `local` is one process, one trial after the other; `parallel` has
several processes on this machine, `cluster` has Ray.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import FilterfoldError, RecordError
from ...training.loggers import LOGS
from ...utils.environment import describe
from ...utils.progress import track
from . import records
from .config import FILE as DESCRIPTION
from .config import Comparison, Trial
from .context import RunContext
from .deadline import Deadline, Stopped
from .locks import held
from .records import Record
from .timing import BATCH_SIZES, measure_together
from .trial import check, forget, now, run_trial

log = logging.getLogger("filterfold.bench.trials")


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs one trial to its record, in whichever process it finds itself: it can be pickled.

    **Arguments:**

    - `bench`: data, device, run folder and clock.
    - `command`: what to note in the records as the way to redo this.
    """

    bench: RunContext
    command: str | None = None

    def __call__(self, trial: Trial) -> Record:
        """Run a trial and write its record; an exception becomes a record of its failure.

        No other process runs the same trial meanwhile; if one has just finished it, its record is the result.

        **Raises:** `Stopped` when the time is up.
        """
        bench = self.bench
        bench.deadline.check()
        with held(bench.lock(trial.id), bench.deadline.check):
            path = bench.folder / records.FOLDER / f"{trial.id}.json"
            if path.exists() and (found := records.read(path))["status"] == "finished":
                return found
            started = now()
            try:
                record = run_trial(trial, bench, command=self.command)
            except Stopped:
                raise
            except Exception as error:
                log.debug("%s failed", trial.id, exc_info=error)
                return self.failed(trial, error, started)
            records.write(bench.folder, record)
            forget(trial, bench)
            return record

    def failed(self, trial: Trial, error: Exception, started: str) -> Record:
        """Write down that a trial failed, and why."""
        record = failure(trial, error, self.bench.device, self.command, started)
        records.write(self.bench.folder, record)
        return record


class Engine(Protocol):
    """Where and in which order pending trials run; gives each record as soon as it is there."""

    def __call__(self, pending: Sequence[Trial], run: Runner) -> Iterator[Record]:
        """Run the trials."""


def local(pending: Sequence[Trial], run: Runner) -> Iterator[Record]:
    """In this process, in the order given."""
    yield from map(run, pending)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a comparison has come.

    **Arguments:**

    - `records`: of all trials of this comparison that ended, now or before.
    - `ran`: ids of the trials that were run now.
    - `left`: number of trials without a finished record.
    - `timed`: whether the inference times of all finished trials were measured together.
    """

    records: tuple[Record, ...]
    ran: tuple[str, ...]
    left: int
    timed: bool

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.left == 0 and self.timed

    @property
    def failed(self) -> tuple[Record, ...]:
        """Records of the trials that failed."""
        return tuple(record for record in self.records if record["status"] == "failed")


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    device: str = "auto",
    stop_after: float | None = None,
    command: str | None = None,
    engine: Engine = local,
    timing_rounds: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    cache_dir: Path | None = None,
    fresh: bool = False,
    trackers: Sequence[str] = (),
) -> Outcome:
    """Run the trials that have no finished record, then measure all networks' inference time together.

    A trial that fails is recorded with its reason, the others go on, and the next call tries it again.

    **Arguments:**

    - `folder`: the run folder; made if need be, or taken up again.
    - `device`: `cpu`, `cuda[:N]`, or `auto`.
    - `stop_after`: seconds after which to stop, with everything saved.
    - `command`: what to note in the records as the way to redo this.
    - `engine`: where trials run.
    - `cache_dir`: where decoded data sets are kept; None for the usual place.
    - `fresh`: remove the run that the folder holds, and start anew.
    - `trackers`: what figures are handed to while trials run: `tensorboard` (event files in `logs/`), `mlflow`.
    - `timing_rounds`: how often every network passes over the test set in the timing pass; None: as often as it takes.
    - `batch_sizes`: images a call at which the timing pass times every network as well.

    **Raises:** `RecordError` if the folder holds something else or another process works there; `DataError`,
    `ModelError` for a setting that no trial could run with.
    """
    folder = Path(folder)
    done = {} if fresh else _done(comparison, folder)
    missing = [trial for trial in comparison.trials if trial.id not in done]
    bench = RunContext(comparison.setting, folder, device, Deadline(stop_after), cache_dir, trackers)
    if missing:
        check(missing, bench)  # what would make every trial fail is refused before the folder is touched
    comparison.claim(folder, command, ours=fresh and clear(folder))
    ran: list[str] = []
    timed = False
    with _alone_in(folder):
        try:
            with _closing(engine(missing, Runner(bench, command))) as running:
                for record in track(running, "trials", len(missing)):
                    ran.append(record["id"])
                    _announce(record, len(ran), len(missing))
            measure_together(list(_done(comparison, folder).values()), bench, timing_rounds, batch_sizes)
            timed = True
        except Stopped:
            log.info("the time is up; the same command goes on from here")
    everything = _recorded(comparison, folder)
    left = len(comparison.trials) - len(records.finished(everything))
    return Outcome(tuple(everything), tuple(ran), left, timed)


def clear(folder: Path) -> bool:
    """Remove a run from its folder: what this package puts there, and nothing else. Whether there was one."""
    if not (folder / DESCRIPTION).exists():
        return False
    for name in (records.FOLDER, "models", "bases", "work", "plots", "tables", LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("model.safetensors", "report.html", DESCRIPTION):
        (folder / name).unlink(missing_ok=True)
    return True


def failure(trial: Trial, error: Exception, device: str, command: str | None, started: str) -> Record:
    """The record of a trial that failed. What was not refused on purpose is a bug: its traceback is kept."""
    known = isinstance(error, FilterfoldError)
    reason = (str(error).strip().splitlines() or [""])[0]
    trace = {} if known else {"traceback": "".join(traceback.format_exception(error))}
    return Record(
        format=records.FORMAT,
        id=trial.id,
        status="failed",
        reason=reason if known else f"{type(error).__name__}: {reason}",
        **trial.to_dict(),
        result=None,
        dense=None,
        history=[],
        clusters_history=[],
        timing=None,
        environment=describe(device) | trace,
        command=command,
        started=started,
        finished=now(),
    )


def _recorded(comparison: Comparison, folder: Path) -> list[Record]:
    """The records of this comparison's own trials; a folder may hold more."""
    if not (folder / records.FOLDER).is_dir():
        return []
    ours = {trial.id for trial in comparison.trials}
    paths = (folder / records.FOLDER / f"{name}.json" for name in ours)
    found = [records.read(path) for path in paths if path.exists()]
    return sorted(found, key=records.order)


def _done(comparison: Comparison, folder: Path) -> dict[str, Record]:
    return records.finished(_recorded(comparison, folder))


def _announce(record: Record, place: int, total: int) -> None:
    where = f"[{place}/{total}] {record['label']} seed {record['seed']}"
    result = record["result"]
    if result is None:
        log.warning("%s failed: %s", where, record["reason"])
    else:
        log.info("%s: top-1 %.2f %%, %.1f s of training", where, result["top1"], result["train_seconds"])


@contextmanager
def _closing(running: Iterator[Record]) -> Iterator[Iterator[Record]]:
    """Give an engine the chance to end its processes, now rather than when its iterator is forgotten."""
    try:
        yield running
    finally:
        if isinstance(running, Generator):
            running.close()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder where another process is at work. The lock ends with the process, however it ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / ".lock"))
        except BlockingIOError:
            raise RecordError(
                f"{folder}: another process is working there; wait for it, or give another folder"
            ) from None
        yield
