"""Measured latency as a budget: widths by what they save on this machine, checked on the cut network itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import SelectionError
from ...plan import ChannelGroup, Plan
from ...profiling import (
    LatencyComparison,
    LayerTimes,
    Mode,
    Timer,
    friendly_step,
    layer_calls,
    measure_latency,
    threads_set,
)
from ...profiling.macs import Cost
from ...utils.progress import track
from .descent import Counts, LayerTimeModel, descend, friendly
from .patterns import check_options
from .ranking import RankedGroup, rank
from .select import achieved_shares, cuttable, refuse_nothing
from .solver import NORMS

_LOG = logging.getLogger("filterfold.pruning.budgets")


CLOSE = 0.03
"""A network this little under the asked share is close enough to stop at: clocks tell no more (the A/A bar)."""


Cutter = Callable[[Plan], nn.Module]
"""Makes the cut on a copy of the network."""


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
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise SelectionError(f"latency={self.share!r} is no share: it must lie above 0 and be at most 1")
        for name, value in (("batch_size", self.batch_size), ("repeats", self.repeats), ("rounds", self.rounds)):
            if value < 1:
                raise SelectionError(f"latency: {name}={value} must be at least 1")


def select_for_latency(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    *,
    latency: float | LatencyBudget,
    model: nn.Module,
    example_inputs: Any,
    cut: Cutter,
    cost: Cost | None = None,
    round_to: int | None = None,
    min_keep: int = 1,
    ignore: Sequence[str] = (),
) -> Plan:
    """Choose the units to keep so that the measured network takes at most a share of its time.

    Convolutions and linear layers are timed alone at a few widths on the model's device. By those times the groups
    are narrowed step by step, each step where the least score is lost for the time saved, over widths that the
    hardware likes (multiples of 16 channels on a CPU, of 8 on a GPU; less where a group is narrow). The station on
    that way is found by cutting copies and timing them against the uncut network, interleaved: the forecast only says
    where to look.

    **Arguments:**

    - `groups`, `scores`, `min_keep`, `ignore`: as for `select`.
    - `latency`: the share of the time that may remain, or a `LatencyBudget` with batch size, mode, ….
    - `model`, `example_inputs`: the uncut network, on the device that matters.
    - `cut`: `cut(plan)` → a cut copy of the model.
    - `cost`: adds the predicted shares of MACs and parameters to the notes.
    - `round_to`: multiples of how many units groups may keep; None or 1: those that the hardware likes.

    **Returns:** a `Plan`; `plan.notes["latency"]` has the shares `asked`, `predicted` (by the layers alone) and
    `measured`, seconds of both networks, the A/A control, and the conditions.

    **Raises:** `SelectionError` if even the narrowest network is too slow (with the share that it reaches), or as
    `select` does.
    """
    budget = latency if isinstance(latency, LatencyBudget) else LatencyBudget(latency)
    round_to = 1 if round_to is None else round_to
    check_options("layer", round_to, min_keep, "mean", NORMS)
    groups = tuple(groups)
    free, ignored = cuttable(groups, ignore)
    ruler = _Ruler(model, example_inputs, budget, cut)
    rooms = [_room(group, scores, round_to, min_keep, ruler.times) for group in free]
    asked = {"latency": budget.share}
    if all(len(room.allowed) == 1 for room in rooms):
        refuse_nothing(groups, rooms, tuple(room.group.size for room in rooms), asked)
    way = _Way(rooms, ruler)
    notes: dict[str, Any] = {"asked": asked}
    if budget.share < 1:
        station, found = way.search(budget)
        notes["latency"] = found
    else:
        station, found = 0, {"measured": 1.0}
    plan = way.plan(station)
    notes["achieved"] = {"latency": found["measured"], **achieved_shares(plan.cuts, cost)}
    frozen = {group.name: group.frozen for group in groups if group.frozen is not None}
    extras = {"frozen": frozen, "ignored": ignored}
    return replace(plan, notes=notes | {name: value for name, value in extras.items() if value})


def _room(
    group: ChannelGroup, scores: Mapping[str, Tensor], round_to: int, min_keep: int, times: LayerTimes
) -> RankedGroup:
    room = rank(group, scores, round_to, min_keep)
    return room if round_to > 1 else friendly(room, friendly_step(group.size, times.device))


class _Ruler:
    """Measures: the uncut network, its layers, and cut copies against it."""

    def __init__(self, model: nn.Module, example_inputs: Any, budget: LatencyBudget, cut: Cutter) -> None:
        self.model, self.example_inputs, self.budget, self.cut = model, example_inputs, budget, cut
        dense = self._compared({"dense": model}, max(3, budget.repeats // 2))
        self.whole = min(dense.row("dense", budget.batch_size).seconds)
        self.calls = layer_calls(model, example_inputs)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            raise SelectionError("latency: the model has no parameters, so nothing of it can be cut")
        with threads_set(budget.threads):
            self.times = LayerTimes(
                parameter.device,
                parameter.dtype,
                budget.batch_size,
                channels_last=budget.mode == "channels_last",
                timer=budget.timer,
                folder=budget.folder,
            )

    def compare(self, plan: Plan, repeats: int) -> LatencyComparison:
        """The uncut network against a cut copy."""
        return self._compared({"dense": self.model, "cut": self.cut(plan)}, repeats)

    def _compared(self, models: Mapping[str, nn.Module], repeats: int) -> LatencyComparison:
        budget = self.budget
        return measure_latency(
            models,
            self.example_inputs,
            batch_sizes=[budget.batch_size],
            mode=budget.mode,
            threads=budget.threads,
            repeats=repeats,
            count_macs=False,
            timer=budget.timer,
        )


class _Way:
    """The stations from the full widths to the smallest, and the search along them."""

    def __init__(self, rooms: Sequence[RankedGroup], ruler: _Ruler) -> None:
        self.rooms, self.ruler = rooms, ruler
        with threads_set(ruler.budget.threads):
            forecast = LayerTimeModel(rooms, ruler.calls, ruler.times, ruler.whole)
            self.stations: list[Counts] = descend(rooms, forecast)
        ruler.times.save()
        full = forecast.seconds(forecast.full)
        self.predicted = [forecast.seconds(counts) / full for counts in self.stations]
        _LOG.info("timed %d layer calls; %d stations", ruler.times.measured, len(self.stations))

    def plan(self, station: int) -> Plan:
        """The cut at a station."""
        return Plan(tuple(room.cut(count) for room, count in zip(self.rooms, self.stations[station], strict=True)))

    def search(self, budget: LatencyBudget) -> tuple[int, dict[str, Any]]:
        """The widest station whose measured share is within the budget, as far as clocks can tell, and its notes."""
        slow, fast, factor, last = 0, len(self.stations), 1.0, len(self.stations) - 1
        best: tuple[int, LatencyComparison] | None = None
        tries: list[dict[str, float]] = []
        margin = CLOSE / 2
        for left in track(reversed(range(budget.rounds)), "cutting copies and timing them", budget.rounds):
            aim = self._station(budget.share * (1 - margin) / factor, slow, fast)
            if left == 0 and best is None:
                aim = last
            plan = self.plan(aim)
            found = self.ruler.compare(plan, budget.repeats)
            if _share(found) <= budget.share:  # what looks good is measured again: luck is not taken for speed
                found = self.ruler.compare(plan, 2 * budget.repeats)
            share = _share(found)
            tries.append({"predicted": self.predicted[aim], "measured": share})
            _LOG.info("latency: predicted %.3f, measured %.3f of the uncut network", self.predicted[aim], share)
            factor = share / self.predicted[aim]
            if share <= budget.share:
                fast, best = aim, (aim, found)
                if share >= budget.share * (1 - CLOSE):
                    break
            else:
                slow, margin = aim, margin + CLOSE / 2  # a miss is no reason to creep on by single stations
            if fast <= slow + 1 or slow >= last:
                break
        if best is None:
            raise SelectionError(
                f"latency={budget.share:g} can't be met: the smallest measured share within reach is "
                f"{min(entry['measured'] for entry in tries):.4f} (batch {budget.batch_size})"
            )
        return best[0], self._notes(best[0], best[1], tries)

    def _station(self, wanted: float, slow: int, fast: int) -> int:
        """The first station between two whose predicted share is small enough."""
        between = range(slow + 1, fast)
        return next((i for i in between if self.predicted[i] <= wanted), between[-1])

    def _notes(self, station: int, found: LatencyComparison, tries: list[dict[str, float]]) -> dict[str, Any]:
        budget = self.ruler.budget
        low, high = found.speedup_interval("cut", budget.batch_size)
        return {
            "asked": budget.share,
            "predicted": self.predicted[station],
            "measured": _share(found),
            "interval": [1 / high, 1 / low],
            "control": found.speedup("A/A control", budget.batch_size),
            "seconds": [found.row(name, budget.batch_size).median for name in ("dense", "cut")],
            "batch_size": budget.batch_size,
            "conditions": dict(found.conditions),
            "tries": tries,
        }


def _share(found: LatencyComparison) -> float:
    """Time of the cut network as a share of the uncut one's."""
    return 1 / found.speedup("cut", found.rows[0].batch_size)
