"""Locks of trials, and which trial a worker takes next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import DENSE_LONG, SCRATCH, SCRATCH_LONG, Trial
from .context import RunContext

POLL_SECONDS = 0.2


def is_held(path: Path) -> bool:
    """Whether a process on a machine that this one hears of holds a lock. It is taken for a moment to find out."""
    if not path.exists():
        return False
    try:
        with held(path):
            return False
    except BlockingIOError:
        return True


@contextmanager
def held(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold a lock for the length of a `with` block.

    **Arguments:**

    - `path`: the lock's file; made if need be, and left there.
    - `waiting`: called again and again while another process holds the lock; it may raise to give up. None: don't
      wait.

    **Raises:** `BlockingIOError` if another process holds the lock and `waiting` is None.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "lock"
    >>> with held(path), held(path):
    ...     pass
    Traceback (most recent call last):
    BlockingIOError: ...
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: go without
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting is None:
                    raise
                waiting()
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(handle)


def take_next(waiting: list[Trial], running: Iterable[Trial], bench: RunContext) -> Trial | None:
    """Take off the list the first trial that need not wait for what a running one is just making.

    Dense trials and those that begin with a dense network train it once for each seed; whoever comes second finds it
    done, or is passed over as long as it is being trained.

    **Returns:** the trial, or None if all have to wait, or none is left.
    """
    busy = {base for trial in running if (base := needed(trial, bench)) is not None}
    for place, trial in enumerate(waiting):
        if needed(trial, bench) not in busy:
            return waiting.pop(place)
    return None


def needed(trial: Trial, bench: RunContext) -> str | None:
    """Id of the dense training that a trial would have to do first, or None."""
    if trial.is_online or trial.plain in (SCRATCH, SCRATCH_LONG, DENSE_LONG) or trial.setting.weights is not None:
        return None
    base = trial.base.id
    return None if bench.base_file(base, ".json").exists() else base
