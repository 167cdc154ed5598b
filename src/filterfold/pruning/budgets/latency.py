"""Measured latency as a budget: widths by what they save on this machine, checked on the cut network itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import SelectionError
from ...plan import ChannelGroup, Plan
from ...profiling import LatencyComparison, LayerTimes, friendly_step, layer_calls, measure_latency, threads_set
from ...profiling.macs import Cost
from ...utils.progress import track
from .layer_times import LayerTimeModel, score_curve
from .options import LatencyBudget, Selection
from .patterns import cuttable
from .prices import Counts
from .ranking import RankedGroup, hardware_friendly
from .select import achieved_shares, left_out, ranked_group, refuse_nothing
from .solver import descend

_LOG = logging.getLogger("filterfold.pruning.budgets")


CLOSE = 0.03
"""A network this little under the asked share is close enough to stop at: clocks tell no more (the A/A bar)."""


Cutter = Callable[[Plan], nn.Module]
"""Makes the cut on a copy of the network."""


def select_for_latency(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    *,
    latency: float | LatencyBudget,
    model: nn.Module,
    example_inputs: Any,
    cut: Cutter,
    cost: Cost | None = None,
    selection: Selection | None = None,
) -> Plan:
    """Choose the units to keep so that the measured network takes at most a share of its time.

    Convolutions and linear layers are timed alone at a few widths on the model's device. By those times the groups
    are narrowed step by step, each step where the least score is lost for the time saved, over widths that the
    hardware likes (multiples of 16 channels on a CPU, of 8 on a GPU; less where a group is narrow). How far to go is
    found by cutting copies and timing them against the uncut network, interleaved: the times of the layers only say
    where to look.

    **Arguments:**

    - `groups`, `scores`: as for `select`.
    - `latency`: the share of the time that may remain, or a `LatencyBudget` with batch size, mode, ….
    - `model`, `example_inputs`: the uncut network, on the device that matters.
    - `cut`: `cut(plan)` → a cut copy of the model.
    - `cost`: adds the predicted shares of MACs and parameters to the notes.
    - `selection`: which units may stay, per layer; its `round_to` of None or 1: multiples that the hardware likes.

    **Returns:** a `Plan`; `plan.notes["latency"]` has the shares `asked`, `predicted` (by the layers alone) and
    `measured`, seconds of both networks, the A/A control, and the conditions.

    **Raises:** `SelectionError` if even the narrowest network is too slow (with the share that it reaches), or as
    `select` does.
    """
    budget = latency if isinstance(latency, LatencyBudget) else LatencyBudget(latency)
    selection, groups, asked = selection or Selection(), tuple(groups), {"latency": budget.share}
    if selection.scope != "layer":
        raise SelectionError("scope= has no effect with latency=: leave it out")
    free, ignored = cuttable(groups, selection.ignore)
    clock = _Clock(model, example_inputs, budget, cut)
    ranked = [ranked_group(group, scores, selection) for group in free]
    if selection.round_to in (None, 1):
        ranked = [hardware_friendly(entry, friendly_step(entry.group.size, clock.times.device)) for entry in ranked]
    if all(len(entry.allowed) == 1 for entry in ranked):
        refuse_nothing(groups, ranked, [entry.group.size for entry in ranked], asked)
    descent = _Descent(ranked, clock)
    notes: dict[str, Any] = {"asked": asked}
    if budget.share < 1:
        step, found = descent.search(budget)
        notes["latency"] = found
    else:
        step, found = 0, {"measured": 1.0}
    plan = descent.plan(step)
    notes["achieved"] = {"latency": found["measured"], **achieved_shares(plan.cuts, cost)}
    return replace(plan, notes=notes | left_out(groups, ignored))


class _Clock:
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


class _Descent:
    """The widths on the way from the full ones to the smallest, and the search for the step to stop at."""

    def __init__(self, ranked: Sequence[RankedGroup], clock: _Clock) -> None:
        self.ranked, self.clock = ranked, clock
        with threads_set(clock.budget.threads):
            model = LayerTimeModel(ranked, clock.calls, clock.times, clock.whole)
            self.steps: list[Counts] = list(descend([score_curve(entry) for entry in ranked], model))
        clock.times.save()
        full = model.seconds(model.full)
        self.predicted = [model.seconds(counts) / full for counts in self.steps]
        _LOG.info("timed %d layer calls; %d steps", clock.times.measured, len(self.steps))

    def plan(self, step: int) -> Plan:
        """The cut after so many steps."""
        return Plan(tuple(entry.cut(number) for entry, number in zip(self.ranked, self.steps[step], strict=True)))

    def search(self, budget: LatencyBudget) -> tuple[int, dict[str, Any]]:
        """The first step whose measured share is within the budget, as far as clocks can tell, and its notes."""
        slow, fast, factor, last = 0, len(self.steps), 1.0, len(self.steps) - 1
        best: tuple[int, LatencyComparison] | None = None
        tries: list[dict[str, float]] = []
        margin = CLOSE / 2
        for left in track(reversed(range(budget.rounds)), "cutting copies and timing them", budget.rounds):
            aim = self._first(budget.share * (1 - margin) / factor, slow, fast)
            if left == 0 and best is None:
                aim = last
            plan = self.plan(aim)
            found = self.clock.compare(plan, budget.repeats)
            if _share(found) <= budget.share:  # what looks good is measured again: luck is not taken for speed
                found = self.clock.compare(plan, 2 * budget.repeats)
            share = _share(found)
            tries.append({"predicted": self.predicted[aim], "measured": share})
            _LOG.info("latency: predicted %.3f, measured %.3f of the uncut network", self.predicted[aim], share)
            factor = share / self.predicted[aim]
            if share <= budget.share:
                fast, best = aim, (aim, found)
                if share >= budget.share * (1 - CLOSE):
                    break
            else:
                slow, margin = aim, margin + CLOSE / 2  # a miss is no reason to go on by single steps
            if fast <= slow + 1 or slow >= last:
                break
        if best is None:
            raise SelectionError(
                f"latency={budget.share:g} can't be met: the smallest measured share within reach is "
                f"{min(entry['measured'] for entry in tries):.4f} (batch {budget.batch_size})"
            )
        return best[0], self._notes(best[0], best[1], tries)

    def _first(self, wanted: float, slow: int, fast: int) -> int:
        """The first step between two whose predicted share is small enough."""
        between = range(slow + 1, fast)
        return next((i for i in between if self.predicted[i] <= wanted), between[-1])

    def _notes(self, step: int, found: LatencyComparison, tries: list[dict[str, float]]) -> dict[str, Any]:
        budget = self.clock.budget
        low, high = found.speedup_interval("cut", budget.batch_size)
        return {
            "asked": budget.share,
            "predicted": self.predicted[step],
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
