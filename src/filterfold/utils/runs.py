"""Whole numbers as runs of [first, count, step], so that JSON of a few lines holds long lists of them."""

from __future__ import annotations

from collections.abc import Sequence

_POSITIONS = 1 << 23
"""Entries that the runs of one plan may stand for in all: 80 ResNet-152s, and half a second."""


def encode(values: Sequence[int]) -> list[list[int]]:
    """Runs of [first, count, step]; most slices of a plan are one run.

    >>> encode((0, 1, 2, -1, -1, 3))
    [[0, 3, 1], [-1, 2, 0], [3, 1, 1]]
    """
    runs: list[list[int]] = []
    for value in values:
        if runs:
            first, count, step = runs[-1]
            if count == 1 and value - first in (0, 1):
                runs[-1] = [first, 2, value - first]
                continue
            if count > 1 and value == first + count * step:
                runs[-1][1] += 1
                continue
        runs.append([value, 1, 1])
    return runs


class Runs:
    """Decodes what `encode` wrote, equal runs to one tuple, and refuses what would fill the memory."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {}
        self._left = _POSITIONS

    def decoded(self, runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The entries that the runs stand for; `ValueError` for what are no runs, or far too many entries.

        >>> Runs().decoded([[0, 3, 1], [-1, 2, 0], [3, 1, 1]])
        (0, 1, 2, -1, -1, 3)
        """
        key = repr(runs)
        if key not in self._known:
            for run in runs:
                if list(map(type, run)) != [int] * 3 or not 0 < run[1] <= self._left:
                    raise ValueError(f"{run!r} is no run of [first, count, step], or all are too long")
                self._left -= run[1]
            self._known[key] = tuple(first + step * index for first, count, step in runs for index in range(count))
        return self._known[key]
