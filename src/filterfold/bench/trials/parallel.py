"""Several trials at a time on one machine: worker processes that share its cores, or its GPUs.

All workers go through the same list of trials, each taking the next one that is free (`Runner.work`), and write the
records themselves. A worker that dies (out of memory, a crash in a library) fails its trial with that reason and is
replaced. A driver that dies takes its workers with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, MutableSequence, Sequence
from contextlib import suppress
from dataclasses import replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from ...errors import ConfigError, TrainingError
from ...utils import distributed
from . import records
from .config import Trial
from .context import Stopped
from .records import Record
from .runner import Runner
from .trial import now

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
        distributed.refuse_under_torchrun("trials in worker processes")
        self.count = count

    def __call__(self, trials: Sequence[Trial], runner: Runner) -> Generator[Record, None, None]:
        """Run the trials; records come in the order in which trials end."""
        pool = _Pool(trials, runner, max(1, torch.get_num_threads() // self.count))
        ended = 0
        try:
            for number in range(min(self.count, len(trials))):
                pool.start(number)
            while pool.workers:
                for record in pool.receive():
                    ended += 1
                    yield record
        finally:
            pool.end()
        if ended < len(trials):
            raise Stopped


class _Pool:
    """Workers that share a list of trials, and what they have to say."""

    def __init__(self, trials: Sequence[Trial], runner: Runner, threads: int) -> None:
        self.trials, self.runner, self.threads = trials, runner, threads
        self.context = multiprocessing.get_context("spawn")
        self.taken = self.context.RawArray("q", len(trials))
        self.started = now()
        self.ended: set[str] = set()
        self.workers: dict[Connection, tuple[int, Any]] = {}

    def start(self, number: int) -> None:
        """Start a worker; GPUs are dealt out by its number."""
        runner = self.runner
        if runner.context.device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
            runner = replace(runner, context=replace(runner.context, device=device))
        link, theirs = self.context.Pipe()
        arguments = (theirs, runner, self.trials, self.taken, self.threads)
        process = self.context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.workers[link] = number, process

    def receive(self) -> Iterator[Record]:
        """Wait until a worker has something to say; gives the records, and hands log messages on."""
        for link in cast("list[Connection]", wait(list(self.workers))):
            try:
                said = link.recv()
            except (EOFError, OSError):
                said = self._gone(link)
            if isinstance(said, logging.LogRecord):
                logging.getLogger(said.name).handle(said)
            elif said is not None:
                self.ended.add(said["id"])
                yield said

    def _gone(self, link: Connection) -> Record | None:
        """Replace a worker that died; gives the record of the trial that it died over."""
        number, process = self.workers.pop(link)
        link.close()
        process.join()
        if process.exitcode == 0:
            return None
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; out of memory? Run fewer trials at a time" if code == -signal.SIGKILL else ""
        taken = [trial for trial, pid in zip(self.trials, self.taken, strict=True) if pid == process.pid]
        if not taken:
            raise TrainingError(f"a worker process died before it began a trial ({how}){hint}")
        self.start(number)
        lost = [trial for trial in taken if trial.id not in self.ended]
        if not lost:
            return None  # it died between two trials
        path = records.record_file(self.runner.context.folder, lost[0].id)
        if path.exists() and (record := records.read(path))["status"] == "finished":
            return record  # it died after its work was done
        error = TrainingError(f"its worker process died ({how}){hint}")
        return self.runner.failed(lost[0], error, self.started)

    def end(self) -> None:
        """End all processes, whatever they are doing."""
        for link, (_, process) in self.workers.items():
            link.close()
            process.terminate()
        for _, process in self.workers.values():
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _work(link: Connection, runner: Runner, trials: Sequence[Trial], taken: MutableSequence[int], threads: int) -> None:
    """A worker's life: one trial after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the driver, which ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    library = logging.getLogger("filterfold")
    library.addHandler(_Passing(link))
    library.setLevel(logging.WARNING)
    library.propagate = False
    with suppress(Stopped, BrokenPipeError):
        for record in runner.work(trials, taken):
            link.send(record)


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


class _Passing(QueueHandler):
    """Hands a worker's messages to the driver, which shows them."""

    def __init__(self, link: Connection) -> None:
        super().__init__(cast(Any, link))

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a message."""
        cast(Connection, self.queue).send(record)
