"""Progress: reported by the library, shown by the command line only.

Library code wraps its long loops in `track`; nothing is printed unless a display is installed
with `show` (the command line does, with Rich).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


Display = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Takes (items, description, total) and gives the items back, drawing as they pass."""


_display: ContextVar[Display | None] = ContextVar("filterfold_progress", default=None)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on, through the display that is installed, if any.

    >>> list(track([1, 2, 3], "counting"))
    [1, 2, 3]
    """
    display = _display.get()
    yield from items if display is None else display(items, description, total)


@contextmanager
def show(display: Display | None) -> Iterator[None]:
    """Install a display for the length of a `with` block; None silences an outer one."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
