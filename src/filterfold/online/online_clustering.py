"""Online clustering: `update_clusters()` groups the filters, `cluster_and_prune()` cuts the network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, SelectionError
from ..graph import Traced, trace_and_measure
from ..plan import ChannelGroup, Plan
from ..profiling.macs import Cost
from ..pruning.budgets import Budget, Selection, choose
from ..pruning.budgets.patterns import check_shares, merged
from ..pruning.budgets.ranking import rank
from ..pruning.criteria import score
from ..pruning.criteria.registry import resolve
from ..pruning.prune import check_averaged, check_optimizers
from ..pruning.scored import Optimizers
from ..surgery.apply import apply_with_sizes
from ..utils.arguments import typed
from ..utils.distributed import agreed, check_wrappers, renew
from ..utils.modules import named_tensors, unwrap
from .assign import ClusterRow, read_row, regroup, summary
from .centripetal_pull import Centripetal
from .cosine_pull import CosinePull
from .cut import (
    EXACT,
    CutResult,
    Undo,
    all_or_nothing,
    apply_remedy,
    kept_values,
    observed,
    rehearsed,
    relative_change,
    sizes_rewriter,
    write_back,
)
from .folding import BoundMeasurement, fold
from .options import CENTROID, FOLD, CutOptions, Pull, Target, check_method
from .schedule import Plateau, Schedule
from .widths import TargetWidths, check_sizes

_LOG = logging.getLogger("filterfold.online")


class OnlineFilterClustering:
    """Groups the filters of a network by direction while it trains, and folds each cluster into one filter.

    Three lines in a training loop: make one, add `loss()` to the loss, call `step(epoch)` after each epoch.
    Parameters keep their identity, so the optimizer, schedulers and hooks go on.

    **Arguments:**

    - `model`: any traceable network, changed in place at milestones; wrapped models are looked into. Under DDP every
      process makes one of these and calls it alike: rank 0 decides, all cut alike, and the wrapper goes on.
    - `example_inputs`: a tensor, tuple or dictionary on the model's device.
    - `optimizer`: one or several; their state is cut alike. `averaged`: EMA copies, likewise.
    - `clusters` | `keep` | `threshold` | `macs`: filters that stay in every group, their share, the cosine similarity
      above which filters fold, or the share of the multiply-accumulates that may remain (milestones take steps of the
      budget, and choose the widths anew). Exactly one. These, `round_to`, `ignore`, and for the rest `target`: see
      `Target`.
    - `schedule`: what `step` does when. Without one there is no `step`: call the two verbs yourself.
    - `pull`: what brings the filters of a cluster together: "cosine", "centripetal" or "none", or a `Pull` with its
      strength.
    - `method`: "fold"; as controls a criterion's name (drops the lowest scores at the same milestones to the same
      widths; no pull), or "centroid" (filters are replaced by their cluster's mean, nothing is removed).
    - `cutting`: how a milestone cuts: features, remedies, seed, verification; see `CutOptions`.

    **Attributes:** `groups` (traced, of the present network), `labels` (group → cluster of each unit), `history`
    (`ClusterRow`s), `cuts` (`CutResult`s of this process), `plans` (all plans so far), `finished`.

    **Raises:** `SelectionError` for a budget that can't be met or patterns that match no layer, `ConfigError` for
    options that make no sense or have no effect together.

    ```python
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> schedule = Schedule(updates=(1, 2), milestones=((2, 1.0),))
    >>> online = OnlineFilterClustering(model, torch.zeros(1, 1, 3, 3), optimizer, clusters=4, schedule=schedule)
    >>> for epoch in (1, 2):
    ...     loss = model(torch.randn(8, 1, 3, 3)).square().mean() + online.loss()
    ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
    ...     events = online.step(epoch)
    >>> model[0].out_channels, model[4].in_features, online.finished
    (4, 4, True)

    ```
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizers = None,
        *,
        clusters: int | Mapping[str, int] | None = None,
        keep: float | Mapping[str, float] | None = None,
        threshold: float | None = None,
        macs: float | None = None,
        round_to: int | None = None,
        ignore: Sequence[str] = (),
        target: Target | None = None,
        schedule: Schedule | None = None,
        pull: str | Pull = "cosine",
        method: str = FOLD,
        averaged: nn.Module | Sequence[nn.Module] = (),
        cutting: CutOptions | None = None,
    ) -> None:
        asked: dict[str, Any] = {"clusters": clusters, "keep": keep, "threshold": threshold, "macs": macs}
        asked |= {"round_to": round_to, "ignore": ignore}
        self.target = Target(**asked) if target is None else merged(target, **asked)
        self.pull = pull if isinstance(pull, Pull) else Pull(pull)  # type: ignore[arg-type]  # which checks it
        self.method, self.cutting, self.schedule = method, cutting or CutOptions(), schedule
        check_method(method, self.target, self.pull)
        self.model, self.example_inputs, self.optimizer, self.averaged = model, example_inputs, optimizer, averaged
        check_wrappers(model)
        check_optimizers(optimizer, self._bare)
        check_averaged(averaged, self._bare)
        self.labels: dict[str, Tensor] = {}
        self.history: list[ClusterRow] = []
        self.cuts: list[CutResult] = []
        self.plans: list[Plan] = []
        self.epoch = 0
        self._passed = 0
        self._plateau: Plateau | None = None
        if schedule is not None and schedule.patience is not None:
            self._plateau = Plateau(schedule.patience, schedule.change)
        self.groups, self._cost = self._traced()
        self.widths = TargetWidths(self.target, self.groups, self._cost)
        if not self.widths.full:
            raise SelectionError("no channel group can be cut: all are frozen or ignored; see filterfold inspect")
        self._pull: CosinePull | Centripetal | None = None

    @property
    def finished(self) -> bool:
        """Whether the last milestone is behind."""
        milestones = self.schedule.milestones if self.schedule is not None else ()
        return bool(milestones) and self._passed == len(milestones)

    @property
    def pulls(self) -> bool:
        """Whether `loss()` is more than zero at present."""
        return isinstance(self._pull, CosinePull) and bool(self._pull.rows)

    def update_clusters(self) -> list[ClusterRow]:
        """Regroup the filters of every group; weights, optimizer and random state stay as they are, bit for bit.

        Aims at the widths of the next milestone. Starts from the clusters of last time, so it is cheap and changes
        only what has become better.

        **Returns:** one row for each group that is to shrink, also added to `history`.
        """
        with all_or_nothing(self, self.widths):
            rows = self._cluster(1.0 if self.schedule is None else self.schedule.next_share(self._passed))
            self._prepare_pull()
        return rows

    def loss(self) -> Tensor:
        """The clustering term: strength / 2 · Σ ‖u - ū‖² over all filters, u a direction, ū its cluster's mean.

        A scalar to add to the task's loss; zero before the first `update_clusters()` and after the last milestone.
        Of coupled layers each counts by itself. See `pull`.
        """
        term = self._pull.loss() if isinstance(self._pull, CosinePull) else None
        return torch.zeros((), device=self._device) if term is None else term

    def add_gradients(self) -> None:
        """Add to the gradients, unscaled, what `loss()` would: cheaper, and for loops whose loss is out of reach."""
        if isinstance(self._pull, CosinePull):
            self._pull.add_gradients()

    def merge_gradients(self) -> None:
        """With `pull="centripetal"`: let the filters of a cluster follow one common gradient, and drift together.

        Call it with gradients in place, unscaled, before the optimizer's step. Nothing happens before the first
        `update_clusters()`, after the last milestone, or with another pull.
        """
        if isinstance(self._pull, Centripetal):
            self._pull.merge()

    @typed
    def cluster_and_prune(self, share: float = 1.0) -> CutResult:
        """Fold every cluster into one unit, physically; model, optimizer state and averaged copies alike.

        One transaction: whatever fails, here or in what follows the cut, everything is afterwards as before.

        **Arguments:**

        - `share`: how far to go from the full to the target widths.

        **Raises:** `VerificationError` if the cut network would not equal the masked one.
        """
        check_shares(share=share)
        with all_or_nothing(self, self.widths) as undo:
            return self._pruned(share, undo)

    @typed
    def step(self, done: int, metric: float | Tensor | None = None) -> list[str]:
        """Do what the schedule says after so many epochs, or optimizer steps if it counts these.

        **Arguments:**

        - `done`: how many are done, counted from 1. Call it after each.
        - `metric`: a loss of this epoch, in training or validation; lower is better. Only a schedule with patience
          needs it.

        **Returns:** what was done, in words, for a record's history; empty if nothing.

        **Raises:** `ConfigError` if there is no schedule, or it needs a metric and there is none; what
        `cluster_and_prune` raises. Whatever fails, everything is afterwards as before, and the milestone not passed.
        """
        if self.schedule is None:
            raise ConfigError("step() needs a schedule: give schedule=Schedule.gradual(epochs), or another")
        if done < 0:
            raise ConfigError(f"step({done}): say how many {self.schedule.unit}s are done")
        events = []
        with all_or_nothing(self, self.widths, *([] if self._plateau is None else [self._plateau])) as undo:
            self.epoch = done
            passed = self._due(self.schedule, done, metric)
            if passed > self._passed:
                events.append(str(self._pruned(self.schedule.milestones[passed - 1][1], undo)))
                self._passed = passed
                if self._plateau is not None:
                    self._plateau.reset()
            due = done in self.schedule.updates and not self.finished and self._clusters
            if due and (rows := self.update_clusters()):
                events.append(summary(rows, {group.name: group.size for group in self._active}))
        return events

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the (cut) model's and the optimizer's own state.

        Nested dictionaries of tensors and plain values, for `filterfold.utils.io.save_tree`.
        """
        return {
            "format": 1,
            "method": self.method,
            "sizes": {group.name: group.size for group in self._active},
            **self.widths.state_dict(),
            "plateau": None if self._plateau is None else self._plateau.state_dict(),
            "labels": {name: labels.clone() for name, labels in self.labels.items()},
            "history": [dict(row) for row in self.history],
            "plans": [plan.to_json() for plan in self.plans],
            "epoch": self.epoch,
            "passed": self._passed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the model must already have the sizes and weights that it had then."""
        if state.get("format") != 1 or state["method"] != self.method:
            raise CheckpointError(
                f"online clustering: the state is of method {state.get('method')!r}, this is {self.method!r}"
            )
        self.groups, self._cost = self._traced()
        check_sizes(state["sizes"], {group.name: group.size for group in self._active})
        self.widths.load_state_dict(state)
        self.labels = {name: labels.clone() for name, labels in state["labels"].items()}
        self.history = [read_row(row) for row in state["history"]]
        self.plans = [Plan.from_json(text) for text in state["plans"]]
        self.epoch, self._passed = int(state["epoch"]), int(state["passed"])
        if self._plateau is not None and state.get("plateau") is not None:
            self._plateau.load_state_dict(state["plateau"])
        self._prepare_pull()

    def _due(self, schedule: Schedule, done: int, metric: float | Tensor | None) -> int:
        """How many milestones are to be behind after this step."""
        passed = schedule.passed(done, self._passed)
        if self._plateau is not None and not self.finished:
            if metric is None:
                raise ConfigError("the schedule waits until training levels off: call step(epoch, metric=loss)")
            levelled = self._plateau.reached(agreed(float(metric)))  # every rank has a loss of its own
            if levelled and passed == self._passed < len(schedule.milestones):
                passed += 1
        return passed

    @property
    def _bare(self) -> nn.Module:
        return unwrap(self.model)

    @property
    def _clusters(self) -> bool:
        """Whether the method looks at clusters at all."""
        return self.method in (FOLD, CENTROID)

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self._bare.parameters()), torch.device("cpu"))

    @property
    def _active(self) -> tuple[ChannelGroup, ...]:
        return self.widths.active(self.groups)

    def _traced(self) -> tuple[Traced, Cost]:
        """The groups of the network as it is now, and what it costs."""
        return trace_and_measure(self._bare, self.example_inputs)

    def _pruned(self, share: float, undo: Undo) -> CutResult:
        """`cluster_and_prune`, inside a transaction."""
        plan = agreed(self._plan(share))
        bound, macs = BoundMeasurement(self._bare, plan), self._cost.macs
        with bound.watching():
            before = observed(self._bare, self.example_inputs)
        bounds, verified = bound.result(), None
        renewed: list[nn.Module] = []
        undo(lambda: renew(renewed[0]) if renewed else None)  # registered first, so that it is done after the rest
        if self.method == CENTROID:
            undo(kept_values(self._bare))
            write_back(self._active, self.labels, self.model)
        elif plan.changes:
            if self.cutting.verify:
                verified = rehearsed(plan, self._bare, self.groups, self.example_inputs)
                plan = replace(plan, attributes=verified.attributes)
            plan = self._cut(plan, undo)
        self.labels, self.widths.chosen = {}, {}
        self._prepare_pull()
        change = relative_change(before, observed(self._bare, self.example_inputs))
        exact = change <= EXACT.get(before[0].dtype, 1e-2) if before else True
        renewed.append(self.model)
        renew(self.model)
        result = CutResult(self.method, plan, (macs, self._cost.macs), change, exact, verified, bounds)
        self.cuts.append(result)
        _LOG.info("%s", result)
        return result

    def _cut(self, plan: Plan, undo: Undo) -> Plan:
        """Make the cut, trace the network that it leaves, and apply the remedy."""
        options = self.cutting
        averaged = [self.averaged] if isinstance(self.averaged, nn.Module) else self.averaged
        networks = [self._bare, *map(unwrap, averaged)] if options.remedy is not None else []
        uncut = [copy.deepcopy(network) if options.remedy == "kernels" else None for network in networks]
        plan, receipt = apply_with_sizes(
            plan,
            self._bare,
            self.example_inputs,
            None if options.verify else sizes_rewriter(self.groups),
            optimizer=self.optimizer,
            averaged=self.averaged,
        )
        undo(receipt.rollback)
        self.plans.append(plan)
        self.groups, self._cost = self._traced()
        for network, before in zip(networks, uncut, strict=True):
            undo(kept_values(network))
            apply_remedy(options, network, before, plan)
        return plan

    def _plan(self, share: float) -> Plan:
        """The cut of this milestone."""
        if self._clusters:
            self._cluster(share, fresh=True)
            return fold(self._active, self.labels, self._bare, gain="regression") if self.method == FOLD else Plan(())
        seed = self.cutting.seed + 1000 * len(self.plans)
        scores = score(self._active, self._bare, self.method, loader=self.cutting.loader, seed=seed)
        if self.target.macs is not None and resolve(self.method).across_layers:
            target = self.target
            selection = Selection("global", target.round_to, target.min_keep)
            budget = Budget(macs=min(self.widths.limit(share) / self._cost.macs, 1.0))
            return choose(self._active, scores, budget, self._cost, selection)
        self._choose_widths(share)
        cuts = []
        for group in self._active:
            width = self.widths.width(group, share)
            if width < group.size:
                cuts.append(rank(group, scores, self.widths.multiple(group), self.target.min_keep).cut(width))
        return Plan(tuple(cuts))

    def _cluster(self, share: float, *, fresh: bool = False) -> list[ClusterRow]:
        """Put every group that is to shrink into clusters; returns and notes what they are like."""
        tensors = dict(named_tensors(self._bare))
        if fresh or not self.widths.chosen:  # between milestones clusters move, their number stays
            self._choose_widths(share)
        rows, labels, threshold = [], {}, self.target.threshold
        how: Any = {"kind": self.cutting.features, "seed": self.cutting.seed, "fresh": fresh, "epoch": self.epoch}
        for group in self._active:
            wanted = self.widths.shared_out(group, share) if threshold is None else float(threshold)
            if wanted is None:
                continue
            labels[group.name], row = regroup(group, tensors, wanted, self.labels.get(group.name), **how)
            rows.append(row)
        rows, self.labels, self.widths.chosen = agreed((rows, labels, self.widths.chosen))
        self.history += rows
        return rows

    def _choose_widths(self, share: float) -> None:
        tensors, features = dict(named_tensors(self._bare)), self.cutting.features
        self.widths.choose(self._active, share, tensors, self._cost, features)

    def _prepare_pull(self) -> None:
        """What `loss` or `merge_gradients` needs, laid out once for all batches until the next update."""
        self._pull = None
        if self.method == FOLD and self.pull.strength and self.labels:
            kind = CosinePull if self.pull.kind == "cosine" else Centripetal
            self._pull = kind(self._active, self.labels, dict(named_tensors(self._bare)), self.pull.strength)
