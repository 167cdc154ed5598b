"""Stopping in time: a run that is given nine minutes ends in nine minutes, with its work saved."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from ...errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Stopped(Exception):
    """Raised when the time is up, which is no error: everything finished so far is on the disk."""


class Deadline:
    """A point in time that long work looks at.

    **Arguments:**

    - `seconds`: time from now, or None for no end.
    - `clock`: seconds that only go up.

    >>> now = iter([0.0, 4.0])
    >>> deadline = Deadline(8.0, clock=lambda: next(now))
    >>> deadline.remaining()
    4.0
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def __reduce__(self) -> tuple[Callable[[float | None], Deadline], tuple[float | None]]:
        """Another process's clock may count from elsewhere: what is handed over is the end by the calendar."""
        return _until, (None if self._end is None else time.time() + self.remaining(),)

    def remaining(self) -> float:
        """Seconds left; infinite without an end."""
        return float("inf") if self._end is None else self._end - self._clock()

    def check(self, needed: float = 0.0) -> None:
        """Raise `Stopped` if less than `needed` seconds are left."""
        if self.remaining() <= needed:
            raise Stopped

    def check_next(self, last: float) -> None:
        """Raise `Stopped` unless another piece of work like the last one, which took so many seconds, fits in."""
        self.check(1.2 * last)


def _until(end: float | None) -> Deadline:
    return Deadline(None if end is None else end - time.time())


def seconds(text: str) -> float:
    """Seconds from a duration as people write it.

    **Raises:** `ConfigError` if it is none.

    >>> seconds("9m"), seconds("1h30m"), seconds("45")
    (540.0, 5400.0, 45.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(f"{text!r} is no duration; write 90s, 9m or 1h30m")
    total = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if total <= 0:
        raise ConfigError(f"{text!r} leaves no time; write 90s, 9m or 1h30m")
    return total
