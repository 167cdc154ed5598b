"""The sweep: every layer pruned alone at rising ratios, evaluated without retraining.

Pruned units are masked (the kernels that read them are zero), so no network is rebuilt; and what comes
before those kernels is computed once per batch, not once per point (`filterfold.bench.sensitivity.partial_forward`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data import batches
from ...data.splits import AnySplit
from ...errors import ConfigError, RecordError, SelectionError
from ...plan import ChannelGroup, Plan
from ...profiling.macs import Cost, measure
from ...pruning.budgets import select
from ...pruning.budgets.patterns import matching
from ...pruning.criteria import score
from ...surgery.masking import masked
from ...utils.io import write_json
from ...utils.model_state import preserved
from ...utils.progress import track
from .curves import Layer, Point, Sensitivity
from .partial_forward import PartialForward

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Li et al. 2017, Figure 2 (b): 10 % … 90 % of the filters pruned away."""


MEMORY = 256 << 20
"""Bytes of activations that are kept at a time; sets the size of the batches."""


LARGEST_BATCH = 128
"""Larger batches leave the processor's caches: ResNet-56 takes longer per image at 250 than at 128."""


_log = logging.getLogger("filterfold.bench.sensitivity")


Key = tuple[str, str, float]
"""(group, criterion, ratio)."""


def sweep(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    split: AnySplit,
    *,
    criteria: Sequence[str] = ("l1",),
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[str] = (),
    images: int | None = None,
    loader: Iterable[Any] | None = None,
    path: Path | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Prune each layer alone at every ratio by every criterion, and evaluate without retraining.

    **Arguments:**

    - `model`: the trained network; it ends as it was.
    - `groups`: what `filterfold.trace` found in it.
    - `split`: images to evaluate on; choices are made from this, so give the validation split.
    - `criteria`: names from `filterfold.pruning.criteria.CRITERIA`; those that read activations need `loader`.
    - `ratios`: shares of the units to remove, in (0, 1).
    - `layers`: names or glob patterns of groups; all that can be cut, if empty.
    - `images`: use at most so many images of the split, drawn by `seed`; None: all.
    - `loader`: batches `(images, labels)` for criteria that read data; run once for each of them.
    - `path`: file that results are written to after every batch, and gone on from; yours to remove once what this
      returns is kept.
    - `seed`: for the random criterion, and which images are used.

    **Returns:** the curves.

    **Raises:** `ConfigError` for ratios out of range or a partial result of another sweep, `SelectionError` for a
    pattern that matches nothing.

    ```python
    >>> from filterfold import data, graph, zoo
    >>> net, digits = zoo.build("vgg_small", channels=1, image_size=8, width=0.25), data.load("digits")
    >>> found = sweep(net, graph.trace(net, digits.example), digits.validation, ratios=[0.5], images=40)
    >>> [(layer.group, layer.points[0].kept) for layer in found.layers]
    [('features.0', 4), ('features.3', 4), ('features.7', 8), ('features.10', 8), ('classifier.0', 8)]

    ```
    """
    groups = tuple(groups)
    _check(criteria, ratios)
    device = next(model.parameters()).device
    held = _taken(split, images, seed).to(device)
    example = next(iter(batches(held, 1, device=device)))[0]
    plans = _plans(model, _chosen(groups, layers), criteria, ratios, loader, seed)
    run = _Sweep(model, groups, plans, example)
    identity = _identity(model, held, plans, seed)
    if path is not None and path.exists():
        run.load(path, identity)
    left = held.take(torch.arange(run.done, len(held)))
    if len(left):
        steps = -(-len(left) // run.batch) * len(run.groups)
        with closing(run.count(left)) as counting:
            for batch_is_over in track(counting, "sensitivity", steps):
                if batch_is_over and path is not None:
                    run.save(path, identity)
    return run.result(_stages(run.groups, measure(model, example)))


class _Sweep:
    """The passes of one call of `sweep`.

    - `groups`: those that have a plan; `plans`: the points that are measured.
    - `sums`: rows are the whole network and then the points; columns: images that are classified right, images whose
      class is among the five likeliest, and the summed loss.
    - `done`: number of images in `sums`.
    """

    def __init__(
        self, model: nn.Module, groups: Iterable[ChannelGroup], plans: dict[Key, Plan], example: Tensor
    ) -> None:
        self.model, self.plans = model, plans
        self.groups = [group for group in groups if any(key[0] == group.name for key in plans)]
        self.forward = PartialForward(model, example)
        self.places = {g.name: self.forward.place(part.tensor for part in g.consumers) for g in self.groups}
        self.partial = dict.fromkeys(self.places, True)
        self.batch = max(1, min(LARGEST_BATCH, MEMORY // max(1, self.forward.bytes(self.places.values()))))
        self.rows = {key: row for row, key in enumerate(plans, 1)}
        self.sums = torch.zeros(1 + len(plans), 3, dtype=torch.double)
        self.done, self.seconds, self.cpu_seconds = 0, 0.0, 0.0

    def count(self, split: AnySplit) -> Generator[bool, None, None]:
        """Evaluate all points on a split; gives after each group whether a batch is over."""
        device = next(self.model.parameters()).device
        with preserved(self.model):
            for number, (images, labels) in enumerate(batches(split, self.batch, device=device, channels_last=True)):
                started, cpu = time.perf_counter(), time.process_time()
                if number == 0:
                    self._compare(images)
                with self.forward.recorded(images, self.places.values()) as again:
                    self.sums[0] += _sums(again(len(self.forward.calls)), labels)
                    for group in self.groups:
                        for key, plan in self._of(group):
                            with masked(self.model, plan):
                                self.sums[self.rows[key]] += _sums(again(self.places[group.name]), labels)
                        if group is not self.groups[-1]:
                            yield False
                self.done += len(labels)
                self.seconds += time.perf_counter() - started
                self.cpu_seconds += time.process_time() - cpu
                yield True

    def _of(self, group: ChannelGroup) -> Iterator[tuple[Key, Plan]]:
        return ((key, plan) for key, plan in self.plans.items() if key[0] == group.name)

    def _compare(self, images: Tensor) -> None:
        """Hold the short cut against a full pass with the same mask, layer by layer; give it up where it differs."""
        with self.forward.recorded(images, self.places.values()) as again:
            for group in self.groups:
                _, plan = next(self._of(group))
                with masked(self.model, plan):
                    if not _same(again(self.places[group.name]), again(0)):
                        _log.warning("%s: running its part of the network alone gives other outputs", group.name)
                        self.places[group.name], self.partial[group.name] = 0, False

    def save(self, path: Path, identity: str) -> None:
        """Write what was measured so far."""
        document = {"identity": identity, "done": self.done, "sums": self.sums.tolist()}
        write_json(path, document | {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds})

    def load(self, path: Path, identity: str) -> None:
        """Go on from what `save` wrote."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["identity"] != identity:
                raise ConfigError(f"{path} is the beginning of another sweep; delete it, or write elsewhere")
            self.sums = torch.tensor(document["sums"], dtype=torch.double)
            self.done, self.seconds = document["done"], document["seconds"]
            self.cpu_seconds = document["cpu_seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: not the beginning of a sweep ({error}); delete it") from error

    def result(self, stages: dict[str, int]) -> Sensitivity:
        """The curves."""

        def scores(row: int) -> dict[str, float]:
            top1, top5, loss = self.sums[row].tolist()
            return {"top1": 100 * top1 / self.done, "top5": 100 * top5 / self.done, "loss": loss / self.done}

        found = []
        for group in self.groups:
            points = tuple(
                Point(criterion, ratio, plan.cuts[0].new_size, **scores(self.rows[name, criterion, ratio]))
                for (name, criterion, ratio), plan in self._of(group)
            )
            partial = self.partial[group.name]
            found.append(Layer(group.name, group.size, stages[group.name], group.exact, partial, points))
        return Sensitivity(scores(0), self.done, tuple(found), self.seconds, self.cpu_seconds)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """A batch's row of `_Sweep.sums`."""
    logits = logits.float()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((hits[:, 0].sum().double(), hits.sum().double(), loss.double())).cpu()


def _check(criteria: Sequence[str], ratios: Sequence[float]) -> None:
    if not criteria or not ratios:
        raise ConfigError("nothing to measure: give at least one criterion and one ratio")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ConfigError(f"ratio {ratio:g}: the share of filters to remove must lie between 0 and 1")
    if len(set(ratios)) < len(ratios) or len(set(criteria)) < len(criteria):
        raise ConfigError("a criterion or a ratio is given twice")


def _chosen(groups: Sequence[ChannelGroup], layers: Sequence[str]) -> list[ChannelGroup]:
    names = {group.name for pattern in layers for group in matching(pattern, groups, "layers")}
    chosen = [group for group in groups if group.frozen is None and (not layers or group.name in names)]
    if not chosen:
        raise SelectionError("no layer to prune: every channel group that was asked for is frozen")
    return chosen


def _taken(split: AnySplit, images: int | None, seed: int) -> AnySplit:
    if images is None or images >= len(split):
        return split
    if images < 1:
        raise ConfigError(f"images={images}: give at least 1")
    generator = torch.Generator().manual_seed(seed)
    return split.take(torch.randperm(len(split), generator=generator)[:images].sort().values)


def _plans(
    model: nn.Module,
    chosen: Sequence[ChannelGroup],
    criteria: Sequence[str],
    ratios: Sequence[float],
    loader: Iterable[Any] | None,
    seed: int,
) -> dict[Key, Plan]:
    """The plan of every point: one cut, everything else whole."""
    plans = {}
    for criterion in criteria:
        scores = score(chosen, model, criterion, loader=loader, seed=seed)
        for group in chosen:
            for ratio in ratios:
                try:
                    plan = select([group], scores, keep=round(1 - ratio, 9))
                except SelectionError:  # the group's classes or blocks leave it whole at this ratio
                    continue
                plans[group.name, criterion, ratio] = plan
    return plans


def _stages(groups: Sequence[ChannelGroup], cost: Cost) -> dict[str, int]:
    """Group → stage: groups whose first layer has as many output positions are of one stage (Li et al. 2017, §3.3)."""
    uses = {layer.tensor: layer.uses for layer in cost.layers}
    found = {}
    for group in groups:
        makers = [part.tensor for part in group.producers if part.role == "filter" and part.tensor in uses]
        found[group.name] = max((uses[name] for name in makers), default=0)
    order = {size: stage for stage, size in enumerate(dict.fromkeys(found.values()), 1)}
    return {name: order[size] for name, size in found.items()}


def _identity(model: nn.Module, split: AnySplit, plans: dict[Key, Plan], seed: int) -> str:
    """A fingerprint of all that the sums depend on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(repr((split.fingerprint, split.normalization, seed)).encode())
    for key, plan in plans.items():
        digest.update(repr((key, plan.cuts[0].assignment)).encode())
    return digest.hexdigest()[:16]


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit on a CPU; elsewhere kernels may be chosen anew for each pass, so to rounding."""
    return torch.equal(one, other) or (one.device.type != "cpu" and torch.allclose(one, other, 1e-4, 1e-5))
