"""The two verbs of online clustering: `update_clusters()` looks, `cluster_and_prune()` cuts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, SelectionError
from ..graph import Traced, trace
from ..plan import ChannelGroup, Plan
from ..profiling.macs import measure
from ..pruning.criteria import CRITERIA, score
from ..utils.distributed import agreed, check_wrappers, renew
from ..utils.inputs import informative_inputs
from ..utils.modules import named_tensors, unwrap
from .assign import ClusterRow, read_row, regroup, summary
from .centripetal_pull import Centripetal
from .cosine_pull import Pulled, pulled
from .cut import (
    CENTROID,
    EXACT,
    FOLD,
    CutResult,
    Remedy,
    check,
    cut_through,
    drop,
    mend,
    observed,
    relative_change,
    remembered,
    write_back,
)
from .folding import Features, bounds, fold, share_out
from .schedule import Plateau, Schedule
from .targets import Target, active, check_sizes
from .widths import widths_for

_STRENGTH = {"cosine": 1e-3, "centripetal": 0.05}


_LOG = logging.getLogger("filterfold.online")


class OnlineFilterClustering:
    """Groups the filters of a network by direction while it trains, and folds each cluster into one filter.

    Three lines in anybody's training loop: make one, add `loss()` to the loss, call `step(epoch)` after each epoch.
    Parameters keep their identity, so the optimizer, schedulers and hooks go on.

    **Arguments:**

    - `model`: any traceable network, changed in place at milestones; wrapped models are looked into. Under DDP every
      process makes one of these and calls it alike: rank 0 decides, all cut alike, and the wrapper goes on.
    - `example_inputs`: a tensor, tuple or dictionary on the model's device.
    - `optimizer`: one or several; their state is cut alike. `averaged`: EMA copies, likewise.
    - `clusters` | `keep` | `threshold` | `macs`: filters that stay in every group (a number, or glob pattern → number),
      their share, the cosine similarity above which filters fold, or the share of the multiply-accumulates that may
      remain (groups that cluster well then give more units; milestones take steps of the budget, and choose the
      widths anew). Exactly one.
    - `schedule`: what `step` does when.
    - `pull`: what brings the filters of a cluster together: "cosine", a term in the loss that turns them (see `pull`),
      or "centripetal", the stronger one: call `merge_gradients()` between backward and the optimizer's step, and they
      become identical, so that the fold is lossless (see `centripetal.py`).
    - `strength`: λ of the term (default .001), or ε of the centripetal rule (default .05, the authors' for ImageNet):
      learning rate × ε × steps, over 1 - momentum, should come to 10 or more.
    - `round_to`: widths are multiples of this. None: with `keep` and `macs`, of 16 in groups that began with 128
      units or more, and exact in narrower ones; numbers given by `clusters` are exact. 1: all are.
    - `ignore`: glob patterns of groups left alone.
    - `method`: "fold"; as controls a criterion's name (drops the lowest scores at the same milestones to the same
      widths; no pull), or "centroid" (filters are replaced by their cluster's mean, nothing is removed).
    - `features`: compare "units", filters by direction with their batch norm's scale and shift where these are
      clearly theirs (folds far better once trained), or "filters" alone, as the document has it.
    - `remedy`: after each cut, measure batch norms anew ("norms"), or repair the next layers' kernels as well
      ("kernels", see `reconstruction.repair`); averaged copies aren't touched. None: leave it to training.
    - `loader`: for criteria that need data, and remedies. `seed`: of k-means and random scores.
    - `verify`: hold every cut against the masked network before it is made.

    **Attributes:** `groups` (traced, of the present network), `labels` (group → cluster of each unit), `history`
    (`ClusterRow`s), `cuts` (`CutResult`s of this process), `plans` (all plans so far), `finished`.

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

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        clusters: int | Mapping[str, int] | None = None,
        keep: float | None = None,
        threshold: float | None = None,
        macs: float | None = None,
        schedule: Schedule | None = None,
        strength: float | None = None,
        averaged: nn.Module | Sequence[nn.Module] = (),
        round_to: int | None = None,
        ignore: Sequence[str] = (),
        method: str = FOLD,
        features: Features = "units",
        loader: Iterable[Any] | None = None,
        seed: int = 0,
        verify: bool = True,
        pull: Literal["cosine", "centripetal"] = "cosine",
        remedy: Remedy | None = None,
    ) -> None:
        check(remedy, loader)
        if method not in (FOLD, CENTROID) and method not in CRITERIA:
            raise ConfigError(f"unknown method {method!r}: fold, centroid or one of {', '.join(sorted(CRITERIA))}")
        if method not in (FOLD, CENTROID) and threshold is not None:
            raise ConfigError(f"a similarity threshold says nothing about how many units {method!r} keeps: give keep")
        if pull not in _STRENGTH:
            raise ConfigError(f"unknown pull {pull!r}: {' or '.join(_STRENGTH)}")
        if strength is not None and strength < 0:
            raise ConfigError(f"strength={strength}: a pull can't be negative")
        self.model, self.example_inputs, self.optimizer, self.averaged = model, example_inputs, optimizer, averaged
        check_wrappers(model)
        self.target = Target(clusters, keep, threshold, round_to, macs)
        self.schedule = schedule or Schedule()
        self.pull, self.strength = pull, float(_STRENGTH[pull] if strength is None else strength)
        self.ignore, self.method, self.features = tuple(ignore), method, features
        self.loader, self.seed, self.verify, self.remedy = loader, seed, verify, remedy
        self.labels: dict[str, Tensor] = {}
        self.history: list[ClusterRow] = []
        self.cuts: list[CutResult] = []
        self.plans: list[Plan] = []
        self.epoch = 0
        self._passed = 0
        self._widths: dict[str, int] = {}
        patience = self.schedule.patience
        self._plateau = None if patience is None else Plateau(patience, self.schedule.change)
        self._look()
        self._full = {group.name: group.size for group in self._active}
        self._full_macs = measure(self._bare, example_inputs).macs if macs is not None else 0
        if not self._full:
            raise SelectionError("no channel group can be cut: all are frozen or ignored; see filterfold inspect")

    @property
    def finished(self) -> bool:
        """Whether the last milestone is behind."""
        return bool(self.schedule.milestones) and self._passed == len(self.schedule.milestones)

    @property
    def pulls(self) -> bool:
        """Whether `loss()` is more than zero at present."""
        return bool(self._pulls) and self.strength > 0

    def update_clusters(self) -> list[ClusterRow]:
        """Regroup the filters of every group; weights, optimizer and random state stay as they are, bit for bit.

        Aims at the widths of the next milestone. Starts from the clusters of last time, so it is cheap and changes
        only what has become better.

        **Returns:** one row for each group that is to shrink, also added to `history`.
        """
        rows = self._cluster(self.schedule.next_share(self._passed))
        self._prepare_pull()
        return rows

    def loss(self) -> Tensor:
        """The clustering term: strength / 2 · Σ ‖u - ū‖² over all filters, u a direction, ū its cluster's mean.

        A scalar to add to the task's loss; zero before the first `update_clusters()` and after the last milestone.
        Of coupled layers each counts by itself. See `pull`.
        """
        total = None
        for entry in self._pulls if self.strength else ():
            value = entry.value()
            total = value if total is None else total + value
        if total is None:
            return torch.zeros((), device=self._device)
        return self.strength * total

    def add_gradients(self) -> None:
        """Add to the gradients, unscaled, what `loss()` would: cheaper, and for loops whose loss is out of reach."""
        for entry in self._pulls if self.strength else ():
            entry.add_gradient(self.strength)

    def merge_gradients(self) -> None:
        """With `pull="centripetal"`: let the filters of a cluster follow one common gradient, and drift together.

        Call it with gradients in place, unscaled, before the optimizer's step. Nothing happens before the first
        `update_clusters()`, after the last milestone, or with another pull.
        """
        if self._centripetal is not None:
            self._centripetal.merge()

    def cluster_and_prune(self, share: float = 1.0) -> CutResult:
        """Fold every cluster into one unit, physically; model, optimizer state and averaged copies alike.

        **Arguments:**

        - `share`: how far to go from the full to the target widths.

        **Raises:** `VerificationError` if the cut network would not equal the masked one; nothing has changed then.
        """
        plan = agreed(self._plan(share))
        before, macs = observed(self._bare, self.example_inputs), measure(self._bare, self.example_inputs).macs
        verified, bounded = None, {}
        if self.method == CENTROID:
            write_back(self._active, self.labels, self.model)
        elif plan.changes:
            uncut, bounded = (
                remembered(self._bare, self.remedy),
                bounds(self._bare, plan, informative_inputs(self.example_inputs)),
            )
            plan, verified = cut_through(
                plan, self._bare, self.groups, self.example_inputs, self.optimizer, self.averaged, verify=self.verify
            )
            self.plans.append(plan)
            self._look()
            mend(self.remedy, self._bare, uncut, plan, self.loader)
        self._forget()
        change = relative_change(before, observed(self._bare, self.example_inputs))
        exact = change <= EXACT.get(before[0].dtype, 1e-2) if before else True
        renew(self.model)
        after = measure(self._bare, self.example_inputs).macs
        result = CutResult(self.method, plan, (macs, after), change, exact, verified, bounded)
        self.cuts.append(result)
        _LOG.info("%s", result)
        return result

    def step(self, epoch: int, metric: float | None = None) -> list[str]:
        """Do what the schedule says after `epoch` (counted from 1) epochs.

        **Arguments:**

        - `metric`: a loss of this epoch, in training or validation; lower is better. Only a schedule with patience
          needs it.

        **Returns:** what was done, in words, for a record's history; empty if nothing.

        **Raises:** `ConfigError` if the schedule needs a metric and there is none.
        """
        self.epoch = epoch
        events = []
        share = self._due(epoch, metric)
        if share is not None:
            events.append(str(self.cluster_and_prune(share)))
        if epoch in self.schedule.updates and not self.finished and self._clusters:
            rows = self.update_clusters()
            if rows:
                events.append(summary(rows, self._sizes))
        return events

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the (cut) model's and the optimizer's own state.

        Nested dictionaries of tensors and plain values, for `filterfold.utils.io.save_tree`.
        """
        return {
            "format": 1,
            "method": self.method,
            "full": dict(self._full),
            "sizes": dict(self._sizes),
            "macs": self._full_macs,
            "widths": dict(self._widths),
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
        self._look()
        check_sizes(state["sizes"], self._sizes)
        self._full = {name: int(size) for name, size in state["full"].items()}
        self.labels = {name: labels.clone() for name, labels in state["labels"].items()}
        self.history = [read_row(row) for row in state["history"]]
        self.plans = [Plan.from_json(text) for text in state["plans"]]
        self._full_macs = int(state.get("macs", 0))
        self._widths = {name: int(width) for name, width in state.get("widths", {}).items()}
        self.epoch, self._passed = int(state["epoch"]), int(state["passed"])
        if self._plateau is not None and state.get("plateau") is not None:
            self._plateau.load_state_dict(state["plateau"])
        self._prepare_pull()

    def _due(self, epoch: int, metric: float | None) -> float | None:
        """The share of the milestone that is to be taken now, which then is behind, or None."""
        levelled = False
        if self._plateau is not None and not self.finished:
            if metric is None:
                raise ConfigError("the schedule waits until training levels off: call step(epoch, metric=loss)")
            levelled = self._plateau.reached(agreed(float(metric)))  # every rank has a loss of its own
        share = self.schedule.due(epoch, self._passed)
        if share is None and levelled and self.schedule.milestones:
            share = self.schedule.next_share(self._passed)
            self._passed += 1
        while self.schedule.due(epoch, self._passed) is not None:
            self._passed += 1
        if share is not None and self._plateau is not None:
            self._plateau.reset()
        return share

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

    def _look(self) -> None:
        """Trace the network as it is now."""
        self.groups: Traced = trace(self._bare, self.example_inputs)
        found = active(self.groups, self.target, self.ignore)
        self._active = tuple(group for group in found if group.name in getattr(self, "_full", {group.name: 0}))
        self._sizes = {group.name: group.size for group in self._active}
        self._pulls: list[Pulled] = []
        self._centripetal: Centripetal | None = None

    def _forget(self) -> None:
        self.labels, self._widths = {}, {}
        self._prepare_pull()

    def _counts(self, group: ChannelGroup, share: float) -> tuple[int, ...] | None:
        """Units to keep in each part of a group, or None if nothing is to be removed."""
        width = self._widths.get(group.name) or self.target.width(group.name, self._full[group.name], share)
        if width >= group.size:
            return None
        counts = share_out(group, width)
        return None if sum(counts) >= group.size else counts

    def _choose_widths(self, share: float) -> None:
        """Choose the widths for a share of the way to the budget, if there is one."""
        if self.target.macs is None:
            return
        self._widths = widths_for(
            self._active,
            dict(named_tensors(self._bare)),
            measure(self._bare, self.example_inputs),
            self._full_macs * (1 - share * (1 - self.target.macs)),
            kind=self.features,
            round_to=self.target.round_to,
            full=self._full,
        )

    def _cluster(self, share: float, *, fresh: bool = False) -> list[ClusterRow]:
        """Put every group that is to shrink into clusters; returns and notes what they are like."""
        tensors = dict(named_tensors(self._bare))
        if fresh or not self._widths:  # between milestones clusters move, their number stays
            self._choose_widths(share)
        rows = []
        for group in self._active:
            threshold = self.target.threshold
            wanted = self._counts(group, share) if threshold is None else float(threshold)
            before = self.labels.pop(group.name, None)
            if wanted is None:
                continue
            self.labels[group.name], row = regroup(
                group, tensors, wanted, before, kind=self.features, seed=self.seed, fresh=fresh, epoch=self.epoch
            )
            rows.append(row)
        rows, self.labels, self._widths = agreed((rows, self.labels, self._widths))
        self.history += rows
        return rows

    def _prepare_pull(self) -> None:
        """What `loss` or `merge_gradients` needs, laid out once for all batches until the next update."""
        self._pulls, self._centripetal = [], None
        if self.method != FOLD or not self.strength or not self.labels:
            return
        tensors = dict(named_tensors(self._bare))
        if self.pull == "cosine":
            self._pulls = pulled(self._active, self.labels, tensors)
        else:
            self._centripetal = Centripetal(self._active, self.labels, tensors, self.strength)

    def _plan(self, share: float) -> Plan:
        """The cut of this milestone."""
        if not self._clusters:
            self._choose_widths(share)
            wanted = {group.name: self._counts(group, share) for group in self._active}
            counts = {name: count for name, count in wanted.items() if count is not None}
            scores = score(
                self._active, self._bare, self.method, loader=self.loader, seed=self.seed + 1000 * len(self.plans)
            )
            return drop(self._active, scores, counts)
        self._cluster(share, fresh=True)
        return fold(self._active, self.labels, self._bare, gain="regression") if self.method == FOLD else Plan(())
