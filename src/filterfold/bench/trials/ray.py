"""Trials on a Ray cluster: each is a task with its share of a machine.

Ray gives tasks out again when a worker or a node dies. The driver starts what can start, collects the records, and
writes them; so the run folder is the same as that of a run on one machine, and either goes on from where the other
stopped. Nodes that see the run folder (one machine, or a shared file system) work in it, and an interrupted trial goes
on from its last epoch. Nodes that don't work in a folder of their own, and networks travel with the records.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError, TrainingError
from ...utils import distributed
from ...utils.io import write_atomically, write_text
from . import records
from .config import Trial
from .deadline import Stopped
from .locks import take_next
from .records import Record
from .trial import now

if TYPE_CHECKING:
    from .runner import Runner


TOKEN = ".token"
"""File in the run folder whose content tells a worker that it sees the same folder as the driver."""


Files = dict[str, bytes]
"""Path in the run folder → content."""


class RayCluster:
    """An engine: trials are tasks on a Ray cluster.

    **Arguments:**

    - `address`: of a running cluster (`auto`, `ray://host:10001`, …); None: a cluster of this machine's cores, that
      ends with the run.
    - `parallel`: trials at a time at most; None: as many as the cluster has room for.
    - `share`: what a trial takes: GPUs on device `cuda` (.25: four share one), else cores. Each trial's PyTorch has as
      many threads as here, shared by `parallel`.
    - `retries`: how often a trial is begun again after its worker died.

    **Raises:** `ConfigError` if Ray is missing or the values make no sense.
    """

    def __init__(
        self, address: str | None = None, *, parallel: int | None = None, share: float = 1.0, retries: int = 3
    ) -> None:
        if not share > 0 or (parallel is not None and parallel < 1):
            raise ConfigError(f"a share of {share:g} for each of {parallel} trials makes no sense; give more than 0")
        distributed.alone("tasks on a Ray cluster")
        try:
            import ray  # noqa: F401  # found missing now, not after the folder is claimed
        except ImportError:
            raise ConfigError("--engine ray needs Ray; install filterfold[ray]") from None
        self.address, self.parallel, self.share, self.retries = address, parallel, share, retries

    def __call__(self, pending: Sequence[Trial], run: Runner) -> Iterator[Record]:
        """Run the trials; records come in the order in which trials end."""
        import ray

        if not pending:
            return
        mine = not ray.is_initialized()
        self._connect()
        try:
            yield from _Driver(self, list(pending), run).go()
        finally:
            if mine:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        try:
            if self.address is None:
                ray.init(address="local", num_cpus=self.parallel, include_dashboard=False, **quiet)
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"--address {self.address or 'local'}: no Ray cluster there ({reason}); "
                "one that asks for a token needs RAY_AUTH_MODE=token in the environment"
            ) from error


class _Driver:
    """Gives out trials and brings in what comes of them."""

    def __init__(self, cluster: RayCluster, waiting: list[Trial], run: Runner) -> None:
        import ray

        self.waiting, self.run, self.bench = waiting, run, run.bench
        on_gpu = self.bench.device.startswith("cuda")
        self.limit = cluster.parallel or len(waiting)
        self.task = ray.remote(_task).options(
            num_cpus=1 if on_gpu else cluster.share,
            num_gpus=cluster.share if on_gpu else 0,
            max_retries=cluster.retries,
        )
        self.threads = max(1, torch.get_num_threads() // (cluster.parallel or 1))
        self.token = secrets.token_hex(16)
        self.tasks: dict[Any, tuple[Trial, str]] = {}

    def go(self) -> Iterator[Record]:
        """Run all trials."""
        import ray

        write_text(self.bench.folder / TOKEN, self.token)
        stopped = False
        try:
            while True:
                while not stopped and len(self.tasks) < self.limit and self._begin():
                    pass
                if not self.tasks:
                    break
                for done in ray.wait(list(self.tasks), num_returns=1)[0]:
                    trial, started = self.tasks.pop(done)
                    record = self._bring_in(done, trial, started)
                    stopped = stopped or record is None
                    if record is not None:
                        yield record
        finally:
            for task in self.tasks:
                ray.cancel(task, force=True)
            (self.bench.folder / TOKEN).unlink(missing_ok=True)
        if stopped:
            raise Stopped

    def _begin(self) -> bool:
        trial = take_next(self.waiting, (trial for trial, _ in self.tasks.values()), self.bench)
        if trial is None:
            return False
        device = "cuda" if self.bench.device.startswith("cuda") else "cpu"  # Ray shows a task its own GPU only
        run = replace(self.run, bench=self.bench.at(device=self.bench.device if device == "cpu" else device))
        self.tasks[self.task.remote(run, trial, self.token, self.threads, _base(run, trial))] = trial, now()
        return True

    def _bring_in(self, done: Any, trial: Trial, started: str) -> Record | None:
        """A task's record and files, put in their places; None if its time was up."""
        import ray
        from ray.exceptions import RayError

        try:
            record, files = ray.get(done)
        except RayError as error:
            lost = TrainingError(
                f"Ray gave it up ({type(error).__name__}: its worker died too often, or could not run)"
            )
            return self.run.failed(trial, lost, started)
        _place(self.bench.folder, files)
        if record is not None and files:
            records.write(self.bench.folder, record)
        return record  # type: ignore[no-any-return]


def _task(run: Runner, trial: Trial, token: str, threads: int, base: Files) -> tuple[Record | None, Files]:
    """One trial on a worker; with the record go the files that the driver does not see yet."""
    torch.set_num_threads(threads)
    folder = run.bench.folder
    if _read(folder / TOKEN) == token.encode():
        try:
            return run(trial), {}
        except Stopped:
            return None, {}
    own = Path(tempfile.gettempdir()) / f"filterfold-{os.getuid()}" / token
    _place(own, base)
    run = replace(run, bench=run.bench.at(folder=own))
    try:
        record = run(trial)
    except Stopped:
        return None, {}
    return record, _base(run, trial) | _files(own, [f"models/{trial.id}.safetensors", f"records/{trial.id}.json"])


def _base(run: Runner, trial: Trial) -> Files:
    """The dense network that the trial begins with, where there is one yet."""
    return _files(run.bench.folder, [f"bases/{trial.base.id}{end}" for end in (".safetensors", ".json")])


def _files(folder: Path, names: Sequence[str]) -> Files:
    return {name: content for name in names if (content := _read(folder / name)) is not None}


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _place(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to their places, in the order given: a base's description comes after its weights."""
    for name, content in files.items():

        def write(path: Path, content: bytes = content) -> None:
            path.write_bytes(content)

        write_atomically(folder / name, write)
