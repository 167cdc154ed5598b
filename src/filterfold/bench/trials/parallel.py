"""Several trials at a time on one machine: worker processes that share its cores, or its GPUs.

A worker writes the records of its trials itself, as the sequential engine does; the driver gives out trials and
collects. A worker that dies (out of memory, a crash in a library) fails its trial with that reason and is replaced. A
driver that dies takes its workers with it; and should one outlive it for a moment, the trial's lock (see
`Runner`) keeps the next run from working on the same trial.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError, TrainingError
from ...utils import distributed
from .config import Trial
from .deadline import Stopped
from .locks import take_next
from .records import Record
from .trial import now

if TYPE_CHECKING:
    from .runner import Runner


log = logging.getLogger("filterfold.bench.trials")


GRACE_SECONDS = 5.0
"""What a worker is given to end when it is told to, before it is killed. Checkpoints are written atomically."""


class Parallel:
    """An engine: `count` worker processes, each running one trial at a time.

    Each gets an equal share of the CPU threads that PyTorch is set to use here; on a machine with several GPUs, and
    device `cuda`, they are dealt out in turn, otherwise all share the one. Floating-point sums depend on the number
    of threads, so the same figures come out as in sequence if that ran with as many threads as each worker has.

    **Arguments:**

    - `count`: number of worker processes.

    A script that uses it needs the usual `if __name__ == "__main__":`, as workers are fresh processes.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"{count} trials at a time make no sense; give at least 1")
        distributed.alone("trials in worker processes")
        self.count = count

    def __call__(self, pending: Sequence[Trial], run: Runner) -> Iterator[Record]:
        """Run the trials; records come in the order in which trials end."""
        waiting = list(pending)
        threads = max(1, torch.get_num_threads() // self.count)
        places = [_Place(_on(run, index), threads) for index in range(min(self.count, len(waiting)))]
        stopped = False
        try:
            while True:
                for place in places:
                    running = [other.trial for other in places if other.trial is not None]
                    if place.trial is None and not stopped and (trial := take_next(waiting, running, run.bench)):
                        place.begin(trial)
                busy = {place.link: place for place in places if place.trial is not None and place.link is not None}
                if not busy:
                    break
                for link in wait(list(busy)):
                    record = busy[link].receive()  # type: ignore[index]
                    stopped = stopped or record is _STOPPED
                    if isinstance(record, dict):
                        yield record
        finally:
            for place in places:
                place.end()
        if stopped:
            raise Stopped


_STOPPED = "stopped"


class _Place:
    """Room for one worker process; it is started when there is a trial for it, and again after it died."""

    def __init__(self, run: Runner, threads: int) -> None:
        self.run, self.threads = run, threads
        self.trial: Trial | None = None
        self.link: Connection | None = None
        self.process: Any = None
        self.started = ""

    def begin(self, trial: Trial) -> None:
        """Give the worker a trial."""
        if self.link is None:
            context = multiprocessing.get_context("spawn")
            self.link, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.run, self.threads), daemon=True)
            self.process.start()
            theirs.close()
        self.trial, self.started = trial, now()
        with suppress(OSError):  # died meanwhile: `receive` notices
            self.link.send(trial)

    def receive(self) -> Record | str | None:
        """What the worker has to say: a record, `_STOPPED`, or nothing to pass on."""
        assert self.link is not None
        assert self.trial is not None
        try:
            kind, said = self.link.recv()
        except (EOFError, OSError):
            return self._died()
        if kind == "log":
            logging.getLogger(said[0]).log(said[1], "%s", said[2])
            return None
        self.trial = None
        return _STOPPED if kind == _STOPPED else said

    def _died(self) -> Record:
        trial, self.trial = self.trial, None
        assert trial is not None
        self.process.join()
        code = self.process.exitcode
        self.end()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; out of memory? Run fewer trials at a time" if code == -signal.SIGKILL else ""
        return self.run.failed(trial, TrainingError(f"its worker process died ({how}){hint}"), self.started)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self.link is None:
            return
        self.link.close()
        self.process.terminate()
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self.link = None


def _on(run: Runner, index: int) -> Runner:
    """The runner for the worker with this number: GPUs are dealt out in turn."""
    if run.bench.device != "cuda":
        return run
    return replace(run, bench=run.bench.at(device=f"cuda:{index % torch.cuda.device_count()}"))


def _work(link: Connection, run: Runner, threads: int) -> None:
    """A worker's life: trials from the driver, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the driver, which ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    library = logging.getLogger("filterfold")
    library.addHandler(_Passing(link))
    library.setLevel(logging.WARNING)
    library.propagate = False
    with suppress(EOFError, OSError):
        while True:
            trial = link.recv()
            try:
                link.send(("record", run(trial)))
            except Stopped:
                link.send((_STOPPED, None))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


class _Passing(logging.Handler):
    """Hands a worker's messages to the driver, which shows them."""

    def __init__(self, link: Connection) -> None:
        super().__init__()
        self.link = link

    def emit(self, record: logging.LogRecord) -> None:
        self.link.send(("log", (record.name, record.levelno, record.getMessage())))
