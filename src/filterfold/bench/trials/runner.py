"""Running many trials: those that have no record yet, until all are done or the time is up.

A run folder:

    comparison.json          what is compared
    records/<trial>.json     one record for each trial that ended
    models/<trial>.safetensors  its final network
    bases/<trial>.*          dense networks that trials of the same seed begin with
    work/<trial>/            training checkpoints of trials that have not ended; removed with them
    .lock, .locks/<trial>    held by the process that runs the comparison, and by those that run its trials

Nothing here depends on what ran before in the same process, so a comparison that was killed goes on with the same
numbers. The folder is the queue: a trial has a name made from its content, a lock, and a record once it has ended. So
any number of workers may go through the same list of trials, each taking the next one whose lock is free. An `Engine`
decides how many workers there are, and where.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, MutableSequence, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from ...errors import OutputError, RecordError
from ...training.loggers import LOGS
from ...utils.io import check_output
from ...utils.progress import track
from . import records
from .config import FILE as DESCRIPTION
from .config import Comparison, Trial, images_of
from .context import Deadline, RunContext, Stopped, lock
from .methods import must_wait
from .records import Record
from .timing import BATCH_SIZES, measure_together
from .trial import check, failure, now, run_trial

log = logging.getLogger("filterfold.bench.trials")


POLL_SECONDS = 0.2
"""How often a worker looks again when every trial that is left has to wait."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs trials to their records, in whichever process it finds itself: it can be pickled.

    **Arguments:**

    - `context`: data, device, run folder and deadline.
    - `command`: what to note in the records as the way to redo this.
    """

    context: RunContext
    command: str | None = None

    def work(self, trials: Sequence[Trial], taken: MutableSequence[int] | None = None) -> Generator[Record, None, None]:
        """Run trials until none is left: always the first that is not taken, whose lock is free, and need not wait.

        **Arguments:**

        - `taken`: for each trial the id of the process that took it, or 0; workers of one run share it, and write to it
          while they hold the trial's lock. None: this is the only worker.

        **Raises:** `Stopped` when the time is up.
        """
        taken = [0] * len(trials) if taken is None else taken
        while 0 in taken:
            self.context.deadline.check()
            for place, trial in enumerate(trials):
                if not taken[place] and not must_wait(trial, self.context):
                    try:
                        with lock(self.context.folder, trial.id).acquire(blocking=False):
                            if taken[place]:
                                continue
                            taken[place] = os.getpid()
                            record = self._run(trial)
                    except Timeout:
                        continue  # an orphan of a run that was killed may still be at it
                    yield record
                    break
            else:
                time.sleep(POLL_SECONDS)

    def __call__(self, trial: Trial) -> Record:
        """Run one trial; wait for its lock if another process holds it.

        **Raises:** `Stopped` when the time is up; `OutputError` if the run folder can't be written.
        """
        with self.context.locked(trial.id):
            return self._run(trial)

    def failed(self, trial: Trial, error: Exception, started: str) -> Record:
        """Write down that a trial failed, and why."""
        record = failure(trial, error, self.context.device, self.command, started)
        records.write(self.context.folder, record)
        return record

    def _run(self, trial: Trial) -> Record:
        """Run a trial and write its record; an exception becomes a record of its failure.

        If another process has just finished the trial, its record is the result.
        """
        self.context.deadline.check()
        path = records.record_file(self.context.folder, trial.id)
        if path.exists() and (found := records.read(path))["status"] == "finished":
            return found
        started = now()
        try:
            record = run_trial(trial, self.context, command=self.command)
        except (Stopped, OutputError):
            raise
        except Exception as error:
            log.debug("%s failed", trial.id, exc_info=error)
            return self.failed(trial, error, started)
        records.write(self.context.folder, record)
        shutil.rmtree(self.context.work(trial.id), ignore_errors=True)
        return record


class Engine(Protocol):
    """Sets workers to work on trials; gives each record as soon as it is there."""

    def __call__(self, trials: Sequence[Trial], runner: Runner) -> Generator[Record, None, None]:
        """Run the trials.

        **Raises:** `Stopped` when the time is up.
        """


def local(trials: Sequence[Trial], runner: Runner) -> Generator[Record, None, None]:
    """One worker: this process."""
    return runner.work(trials)


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
    def total(self) -> int:
        """Number of trials of the comparison."""
        return self.left + len(records.finished(self.records))

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
    batch_sizes: Sequence[int] | None = BATCH_SIZES,
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
    - `batch_sizes`: images a call at which the timing pass times every network as well; None: nothing is timed.

    **Raises:** `RecordError` if the folder holds something else or another process works there; `DataError`,
    `ModelError` for a setting that no trial could run with; `OutputError` if the folder can't be written.
    """
    folder = Path(folder)
    check_output(folder, folder=True)
    known = None if fresh else images_of(folder)
    timing = batch_sizes is not None
    context = RunContext(comparison.setting, folder, device, Deadline(stop_after), cache_dir, trackers, known, timing)
    # what would make every trial fail, and a folder of something else, is refused before the folder is touched
    if missing := comparison.trials if fresh else _missing(comparison, folder):
        check(missing, context)
        context.images = context.data.fingerprint
    if not (fresh and (folder / DESCRIPTION).exists()):
        comparison.entries(folder)
    ran: list[str] = []
    timed = batch_sizes is None
    with _alone_in(folder):
        comparison.claim(folder, command, fresh=fresh and clear(folder), images=context.images)
        missing = _missing(comparison, folder)
        if missing and (begins := context.told()):
            log.info("%s", begins)
        try:
            with closing(engine(missing, Runner(context, command))) as running:
                for record in track(running, "trials", len(missing)):
                    ran.append(record["id"])
                    _announce(record, len(ran), len(missing))
            finished = records.finished(_recorded(comparison, folder))
            timed = timed or _timed(finished, context, timing_rounds, batch_sizes or ())
            for trial in comparison.trials:
                _tidy(trial, context, finished)
        except Stopped:
            log.info("the time is up; the same command goes on from here")
        everything = _recorded(comparison, folder)
    left = len(comparison.trials) - len(records.finished(everything))
    return Outcome(tuple(everything), tuple(ran), left, timed)


def _timed(finished: Mapping[str, Record], context: RunContext, rounds: int | None, batch_sizes: Sequence[int]) -> bool:
    """The last step, which can be interrupted without harm: time all networks. Whether it was done."""
    try:
        measure_together(list(finished.values()), context, rounds, batch_sizes)
    except KeyboardInterrupt:
        log.warning("timing was interrupted; everything else is done, and the same command goes on with the timing")
        return False
    return True


def clear(folder: Path) -> bool:
    """Remove a run from its folder: what this package puts there, and nothing else. Whether there was one.

    Its description stays until another is written: the folder is known for a run folder, whatever else lies in it.
    """
    if not (folder / DESCRIPTION).exists():
        return False
    for name in (records.FOLDER, "models", "bases", "work", "plots", "tables", LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("model.safetensors", "report.html"):
        (folder / name).unlink(missing_ok=True)
    return True


def _tidy(trial: Trial, context: RunContext, finished: Mapping[str, Record]) -> None:
    """Remove what a trial needs no more: it was killed after its record was written, before it did so itself."""
    if trial.id in finished:
        shutil.rmtree(context.work(trial.id), ignore_errors=True)
    if context.base_file(trial.base.id, ".json").exists() and not context.is_locked(f"base-{trial.base.id}"):
        shutil.rmtree(context.work(trial.base.id), ignore_errors=True)


def _recorded(comparison: Comparison, folder: Path) -> list[Record]:
    """The records of this comparison's own trials; a folder may hold more."""
    paths = (records.record_file(folder, trial.id) for trial in comparison.trials)
    return sorted((records.read(path) for path in paths if path.exists()), key=records.order)


def _missing(comparison: Comparison, folder: Path) -> list[Trial]:
    """The trials without a finished record."""
    done = records.finished(_recorded(comparison, folder))
    return [trial for trial in comparison.trials if trial.id not in done]


def _announce(record: Record, place: int, total: int) -> None:
    where = f"[{place}/{total}] {record['label']} seed {record['seed']}"
    result = record["result"]
    if result is None:
        log.warning("%s failed: %s", where, record["reason"])
    else:
        log.info("%s: top-1 %.2f %%, %.1f s of training", where, result["top1"], result["train_seconds"])


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder where another process is at work. The lock ends with the process, however it ends."""
    held = FileLock(folder / ".lock")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise RecordError(f"{folder}: another process is working there; wait for it, or give another folder") from None
    except NotImplementedError:
        raise RecordError(f"{folder}: its file system knows no locks (flock); give a folder on another one") from None
    try:
        yield
    finally:
        held.release()
