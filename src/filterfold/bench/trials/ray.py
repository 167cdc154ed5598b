"""Trials on a Ray cluster: each is a task with its share of a machine.

Ray is the queue here: it gives tasks to nodes, and gives them out again when a worker or a node dies. The driver
collects the records, so the run folder is the same as that of a run on one machine, and either goes on from where the
other stopped. Nodes that see the run folder (one machine, or a shared file system) work in it, and an interrupted trial
goes on from its last epoch. Nodes that don't work in a folder of their own, and networks travel with the records.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, TrainingError
from ...utils import distributed
from ...utils.io import write_atomically, write_text
from . import records
from .config import Trial
from .context import Stopped
from .methods import needed_base
from .records import Record
from .runner import Runner
from .trial import now

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

    def __call__(self, trials: Sequence[Trial], runner: Runner) -> Generator[Record, None, None]:
        """Run the trials; records come in the order in which trials end."""
        import ray

        if not trials:
            return
        mine = not ray.is_initialized()
        if mine:
            self._connect()
        folder = runner.context.folder
        token = secrets.token_hex(16)
        write_text(folder / TOKEN, token)
        task, threads = self._task(runner), max(1, torch.get_num_threads() // (self.parallel or 1))
        waiting, tasks, stopped = list(trials), dict[Any, tuple[Trial, str]](), False
        try:
            while tasks or (waiting and not stopped):
                while not stopped and len(tasks) < (self.parallel or len(trials)):
                    trial = _next(waiting, [trial for trial, _ in tasks.values()], runner)
                    if trial is None:
                        break
                    waiting.remove(trial)
                    tasks[task.remote(runner, trial, token, threads, _base(folder, trial))] = trial, now()
                [done], _ = ray.wait(list(tasks), num_returns=1)
                record = _result(done, *tasks.pop(done), runner)
                if record is None:
                    stopped = True
                else:
                    yield record
        finally:
            for unfinished in tasks:
                ray.cancel(unfinished, force=True)
            (folder / TOKEN).unlink(missing_ok=True)
            if mine:
                ray.shutdown()
        if stopped:
            raise Stopped

    def _connect(self) -> None:
        import ray

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

    def _task(self, runner: Runner) -> Any:
        """`_run` as a remote function, with what it takes."""
        import ray

        on_gpu = runner.context.device.startswith("cuda")
        return ray.remote(_run).options(
            num_cpus=1 if on_gpu else self.share, num_gpus=self.share if on_gpu else 0, max_retries=self.retries
        )


def _next(waiting: Sequence[Trial], running: Sequence[Trial], runner: Runner) -> Trial | None:
    """The first trial that does not begin with a dense network that a running one is just training."""
    busy = {needed_base(trial, runner.context) for trial in running} - {None}
    return next((trial for trial in waiting if needed_base(trial, runner.context) not in busy), None)


def _result(done: Any, trial: Trial, started: str, runner: Runner) -> Record | None:
    """A task's record, with its files put in their places; None if its time was up."""
    import ray
    from ray.exceptions import RayError

    try:
        record, files = ray.get(done)
    except RayError as error:
        name = type(error).__name__
        lost = TrainingError(f"Ray gave it up ({name}: its worker died too often, or could not run)")
        return runner.failed(trial, lost, started)
    _place(runner.context.folder, files)
    if record is not None and files:
        records.write(runner.context.folder, record)
    return record  # type: ignore[no-any-return]


def _run(runner: Runner, trial: Trial, token: str, threads: int, base: Files) -> tuple[Record | None, Files]:
    """One trial on a worker; with the record go the files that the driver does not see yet."""
    torch.set_num_threads(threads)
    context = runner.context
    if context.device.startswith("cuda"):
        context = replace(context, device="cuda")  # Ray shows a task its own GPU only
    shared = _read(context.folder / TOKEN) == token.encode()
    if not shared:
        own = Path(tempfile.gettempdir()) / f"filterfold-{os.getuid()}" / token
        context = replace(context, folder=own)
        _place(context.folder, base)
    try:
        record = replace(runner, context=context)(trial)
    except Stopped:
        return None, {}
    if shared:
        return record, {}
    made = _files(context.folder, [f"models/{trial.id}.safetensors", f"records/{trial.id}.json"])
    return record, _base(context.folder, trial) | made


def _base(folder: Path, trial: Trial) -> Files:
    """The dense network that the trial begins with, where there is one yet."""
    return _files(folder, [f"bases/{trial.base.id}{end}" for end in (".safetensors", ".json")])


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
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
