"""Locks between processes: files that one process holds, and that are free again when it ends, however it ends.

They are kernel locks (`flock`), so a process that is killed leaves none behind, and nobody has to guess whether the
writer of a stale file is still alive. A network file system carries them over to other machines where it knows how to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
