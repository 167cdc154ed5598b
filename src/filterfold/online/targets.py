"""How many units every group is to end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import CheckpointError, ConfigError, SelectionError
from ..plan import ChannelGroup

WIDE, EVEN = 128, 16
"""Layers of so many units or more get widths that are multiples of 16: vector units and tensor cores work in such
portions. In full-width VGG-16 with 30 % kept that makes a CPU 10.4 times faster instead of 8.2. Narrower layers would
miss what was asked for by too much."""


def multiple(round_to: int | None, full: int) -> int:
    """What the width of a group that began with `full` units is to be a multiple of; None: 16 where it is wide.

    >>> multiple(None, 512), multiple(None, 64), multiple(8, 64)
    (16, 1, 8)
    """
    return round_to if round_to is not None else EVEN if full >= WIDE else 1


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked for; exactly one of clusters, keep, threshold and macs.

    **Arguments:**

    - `clusters`: units in every group, or glob pattern → units; a group with fewer keeps them.
    - `keep`: share of the units kept in every group.
    - `threshold`: cosine similarity above which filters fold together.
    - `round_to`: widths are multiples of this (the nearest, at least one of them), where that removes something.
      None: see `multiple`; with `clusters`, which are taken at their word, 1.
    - `macs`: share of the multiply-accumulates that may remain; widths are then chosen by `widths_for`.
    """

    clusters: int | Mapping[str, int] | None = None
    keep: float | None = None
    threshold: float | None = None
    round_to: int | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        given = [name for name in ("clusters", "keep", "threshold", "macs") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none"
            raise ConfigError(f"give exactly one of clusters, keep, threshold and macs, not {what}")
        counts = self.clusters.values() if isinstance(self.clusters, Mapping) else [self.clusters]
        if any(count is not None and count < 1 for count in counts):
            raise ConfigError(f"clusters={self.clusters}: at least one unit must stay")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: the share that is kept lies in (0, 1]")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise ConfigError(f"macs={self.macs}: the share of multiply-accumulates that may remain lies in (0, 1]")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold}: a cosine similarity lies in [-1, 1]")
        if self.round_to is not None and self.round_to < 1:
            raise ConfigError(f"round_to={self.round_to}: must be at least 1")

    def width(self, name: str, full: int, share: float = 1.0) -> int:
        """Units that a group of `full` units has when it is `share` of the way to its target.

        >>> Target(keep=0.5).width("conv", 64, 0.4), Target(clusters=10).width("conv", 8)
        (51, 8)
        >>> Target(keep=0.3).width("conv", 512), Target(keep=0.3, round_to=1).width("conv", 512)
        (160, 153)
        >>> Target(clusters={"body.*": 10}, round_to=8).width("body.3", 64), Target(clusters={"a": 3}).width("b", 64)
        (8, 64)
        """
        end = self._end(name, full)
        if end >= full:
            return full
        exact = full + (end - full) * share
        width = int(round(exact, 9))
        step = multiple(1 if self.round_to is None and self.keep is None else self.round_to, full)
        if step > 1:
            width = max(int(exact / step + 0.5), 1) * step
        return min(max(width, 1), full)

    def _end(self, name: str, full: int) -> int:
        if self.keep is not None:
            return max(int(round(full * self.keep, 9)), 1)
        if isinstance(self.clusters, Mapping):
            return next((count for pattern, count in self.clusters.items() if fnmatchcase(name, pattern)), full)
        return full if self.clusters is None else self.clusters


def active(groups: Sequence[ChannelGroup], target: Target, ignore: Sequence[str]) -> tuple[ChannelGroup, ...]:
    """The groups that may be folded: not frozen, with filters of their own, and not ignored.

    **Raises:** `SelectionError` if a pattern fits no group.
    """
    patterns = [*ignore, *(target.clusters if isinstance(target.clusters, Mapping) else ())]
    for pattern in patterns:
        if not any(fnmatchcase(group.name, pattern) for group in groups):
            names = ", ".join(group.name for group in groups[:4])
            raise SelectionError(f"{pattern!r} fits no channel group; there are {names}, …")
    return tuple(
        group
        for group in groups
        if group.frozen is None
        and group.size > 1
        and any(piece.role in ("filter", "depthwise") for piece in group.producers)
        and not any(fnmatchcase(group.name, pattern) for pattern in ignore)
    )


def check_sizes(there: Mapping[str, int], here: Mapping[str, int]) -> None:
    """**Raises:** `CheckpointError` naming the first group that a state and a network do not agree on."""
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"online clustering: group {name!r} has {here.get(name)} units, the state says {there.get(name)}: "
                "restore the model before it"
            )
