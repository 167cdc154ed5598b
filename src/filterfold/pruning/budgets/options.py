"""Options as objects: how much may remain, and which units may stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ...errors import SelectionError
from ...profiling import Mode, Timer
from ...utils.arguments import check_fields
from .patterns import check_counts, check_floor, check_one_budget, check_shares
from .ranking import count, least
from .solver import NORMS, Normalize, Scope


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """How much of the time may remain, and how it is measured.

    **Arguments:**

    - `share`: of the uncut network's time, in (0, 1].
    - `batch_size`: examples per call: the batch size that the network will be used with.
    - `mode`: how both networks are run, see `filterfold.profiling.measure_latency`.
    - `threads`: CPU threads; None leaves what is set.
    - `repeats`: rounds of each measurement; the final one has twice as many.
    - `rounds`: how many cut networks are measured at most.
    - `folder`: where times of layers are kept, see `filterfold.profiling.LayerTimes`; False: nowhere.
    - `timer`: a clock, see `measure_latency`.
    """

    share: float
    batch_size: int = 64
    mode: Mode = "eager"
    threads: int | None = None
    repeats: int = 10
    rounds: int = 12
    folder: Path | str | bool | None = None
    timer: Timer | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_fields(self)
        check_shares(latency=self.share)
        for name, value in (("batch_size", self.batch_size), ("repeats", self.repeats), ("rounds", self.rounds)):
            if value < 1:
                raise SelectionError(f"latency: {name}={value} must be at least 1")
        check_counts(threads=self.threads)
        if self.mode not in get_args(Mode):
            raise SelectionError(f"latency: mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        if self.folder is True:
            raise SelectionError("latency: folder=True: give a folder, or False for none")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a network may remain: `keep`, `macs` and/or `parameters`, or `latency`; see `select` and `prune`."""

    keep: float | Mapping[str, float] | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | LatencyBudget | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share, or no budget at all."""
        check_shares(keep=self.keep, macs=self.macs, parameters=self.parameters)
        if not isinstance(self.latency, LatencyBudget):
            check_shares(latency=self.latency)
        self.asked()

    def asked(self) -> dict[str, Any]:
        """What was given, by name, for a plan's notes."""
        sizes = {"macs": self.macs, "parameters": self.parameters}
        return check_one_budget({"keep": self.keep}, sizes, {"latency": self.latency})


@dataclass(frozen=True, slots=True)
class Selection:
    """Which units may stay, within whatever budget.

    **Arguments:**

    - `scope`: `"layer"` ranks within each group; `"global"` ranks the units of all groups together, after dividing
      each group's scores by `normalize`.
    - `round_to`: a group keeps a multiple of this many units, the nearest to what it would keep (the smaller one of
      two equally near), at least one multiple; or else all its units. So a group narrower than `round_to` stays
      whole. None: multiples of 16 in groups of 128 units or more, any number in narrower ones.
    - `min_keep`: every group keeps at least so many units (all, if it has no more); a number below 1 is a share of
      the group's units.
    - `max_cut`: no group loses a larger share of its units than this.
    - `ignore`: names or glob patterns of layers whose channels stay whole.
    - `normalize`: `"mean"`, `"max"` or `"l2"` of the absolute scores of the group, or `"none"`; for `"global"` only.
    """

    scope: Scope = "layer"
    round_to: int | None = 1
    min_keep: float = 1
    ignore: Sequence[str] = ()
    normalize: Normalize = "mean"
    max_cut: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what does not exist or has no effect."""
        check_fields(self)
        check_counts(round_to=self.round_to)
        check_floor(self.min_keep)
        check_shares(max_cut=self.max_cut)
        if self.scope not in ("layer", "global"):
            raise SelectionError(f'scope={self.scope!r}: must be "layer" or "global"')
        if self.normalize not in NORMS:
            raise SelectionError(f"normalize={self.normalize!r}: must be one of {', '.join(NORMS)}")
        if self.normalize != "mean" and self.scope == "layer":
            raise SelectionError('normalize= has no effect with scope="layer": leave it out')

    def least(self, size: int) -> int:
        """How many units a group of `size` keeps at least, by `min_keep` and `max_cut`.

        >>> Selection(min_keep=4).least(64), Selection(min_keep=4, max_cut=0.75).least(64)
        (4, 16)
        """
        return max(least(size, self.min_keep), size - count(size, self.max_cut))
