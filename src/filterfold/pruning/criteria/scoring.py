"""Scores of all groups, with the units that follow from shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from itertools import islice
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from ...errors import ConfigError, DataError, one_line, pass_on_exhaustion
from ...plan import DROPPED, ChannelGroup, Plan, Slice
from ...utils.arguments import typed
from ...utils.modules import named_tensors
from ...utils.progress import track
from .registry import Batch, Criterion, Function, resolve
from .unit_rows import COMBINE, Combine

Follow = Literal["shortcut"]


WORDS = ("downsample", "shortcut", "skip", "proj")
"""What projection shortcuts are called in torchvision, timm, and the usual CIFAR code."""


def following(group: ChannelGroup, evidence: Mapping[str, Tensor]) -> ChannelGroup:
    """The group as its projection shortcut alone makes it, for scoring; the group itself if it has none.

    Li et al. (2017), section 3.4: "the filters of the second layer of the residual block are pruned by the indices
    selected by the shortcut". The projection is the one coupled layer with 1×1 kernels among layers with larger ones,
    or, where others have 1×1 kernels too (bottleneck blocks), the one that is called so.

    **Arguments:**

    - `group`: a channel group.
    - `evidence`: parameters by name, for the kernels' sizes; names that are missing are judged by name alone.

    ```python
    >>> import torch
    >>> parts = (Slice("conv2.weight", 0, (0, 1), "filter"), Slice("downsample.0.weight", 0, (0, 1), "filter"))
    >>> group = ChannelGroup("conv2", 2, parts, (), True, None, (0, 0), (0, 0))
    >>> kernels = {"conv2.weight": torch.zeros(2, 2, 3, 3), "downsample.0.weight": torch.zeros(2, 1, 1, 1)}
    >>> [part.tensor for part in following(group, kernels).producers]
    ['downsample.0.weight']

    ```
    """
    makers = [part for part in group.producers if part.role == "filter"]
    named = [part for part in makers if any(word in part.tensor for word in WORDS)]
    small = [part for part in makers if _is_pointwise(part, evidence)]
    found = named if len(named) == 1 else small if len(small) == 1 else []
    if len(makers) < 2 or not found or not set(range(group.size)) <= set(found[0].units):
        return group
    return replace(group, producers=tuple(found))


def _is_pointwise(part: Slice, evidence: Mapping[str, Tensor]) -> bool:
    tensor = evidence.get(part.tensor)
    return tensor is not None and tensor.dim() > 2 and prod(tensor.shape[2:]) == 1


@typed
def score(
    groups: Iterable[ChannelGroup],
    model: nn.Module,
    criterion: str | Function | Criterion = "l1",
    *,
    loader: Iterable[Any] | None = None,
    batches: int | None = None,
    loss: Callable[..., Tensor] = cross_entropy,
    combine: Combine = "sum",
    seed: int = 0,
    without: Plan | None = None,
    follow: Follow | None = None,
) -> dict[str, Tensor]:
    """Score the units of all groups that can be cut.

    **Arguments:**

    - `groups`: what `filterfold.trace` found; frozen ones are left out.
    - `model`: the model that they were found in. Its modes, gradients, hooks and the random state
      are afterwards as before.
    - `criterion`: a name from `CRITERIA`, or a function `f(group, tensors)` → `(size,)`.
    - `loader`: for criteria that need data: gives `(inputs, targets)` or inputs; inputs are a tensor,
      a tuple or a mapping, and are moved to the model's device.
    - `batches`: use at most so many batches of the loader.
    - `loss`: `loss(outputs, targets)` → scalar, for criteria that need gradients.
    - `combine`: how the scores of coupled layers become one: `"sum"`, `"mean"`, `"max"` or `"first"`.
    - `seed`: for the random criterion.
    - `without`: a plan for other groups: input kernels of the units that it drops are left out of
      the scores. This is the greedy scoring of Li et al. (2017), section 3.2 (see
      `filterfold.pruning.budgets.select_greedily`); without it, scoring is independent.
    - `follow`: `"shortcut"`: where a projection shortcut is among the coupled layers, it alone decides
      (Li et al. 2017, section 3.4), by its filters or their feature maps; None: all of them, by `combine`.

    **Returns:** group name → float64 scores of shape `(size,)` on the CPU, higher = keep.

    **Raises:** `ConfigError` for an unknown criterion, or one that does not suit a group;
    `DataError` for a missing or empty loader.

    ```python
    >>> from filterfold.plan import ChannelGroup
    >>> from filterfold.plan import Slice
    >>> conv = nn.Conv2d(1, 2, 1)
    >>> conv.weight.data = torch.tensor([-3.0, 2.0]).view(2, 1, 1, 1)
    >>> group = ChannelGroup("", 2, (Slice("weight", 0, (0, 1), "filter"),), (), True, None, (0, 0), (0, 0))
    >>> score([group], conv)
    {'': tensor([3., 2.], dtype=torch.float64)}

    ```
    """
    chosen = resolve(criterion)
    free = [group for group in groups if group.frozen is None]
    if batches is not None and batches < 1:
        raise ConfigError(f"batches={batches}: at least 1")
    if combine not in COMBINE:
        raise ConfigError(f"combine={combine!r}: must be one of {', '.join(COMBINE)}")
    if follow not in (None, "shortcut"):
        raise ConfigError(f"follow={follow!r}: must be 'shortcut' or None")
    if combine != "sum" and not chosen.takes("combine"):
        raise ConfigError(f"criterion {chosen.name!r} does not combine scores of coupled layers: leave combine away")
    if chosen.gather is None:
        evidence: Mapping[str, Tensor] = _tensors(model, without)
    else:
        if without is not None:
            raise ConfigError(
                f"criterion {chosen.name!r} reads data, so it can't leave out dropped inputs; use weights"
            )
        evidence = _gathered(chosen, model, free, loader, batches, loss)
    led = [group if follow is None else following(group, evidence) for group in free]
    return {group.name: _checked(chosen, group, chosen(group, evidence, combine=combine, seed=seed)) for group in led}


def _tensors(model: nn.Module, without: Plan | None) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model)}
    for cut in without.cuts if without is not None else ():
        for part in cut.consumers:
            if DROPPED in cut.assignment:
                gone = [p for p, unit in enumerate(part.units) if unit >= 0 and cut.assignment[unit] == DROPPED]
                index = torch.tensor(gone, device=tensors[part.tensor].device, dtype=torch.int64)
                tensors[part.tensor] = tensors[part.tensor].index_fill(part.axis, index, 0)
    return tensors


def _gathered(
    chosen: Criterion,
    model: nn.Module,
    groups: list[ChannelGroup],
    loader: Iterable[Any] | None,
    batches: int | None,
    loss: Callable[..., Tensor],
) -> Mapping[str, Tensor]:
    if loader is None:
        raise DataError(f"criterion {chosen.name!r} reads data: give it a loader")
    assert chosen.gather is not None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = len(loader) if isinstance(loader, Sized) else None
    total = batches if total is None or batches is None else min(total, batches)
    passed = _Passed()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        limited = islice(loader, batches)  # in here, since it may draw a random order at once
        stream = passed.count(_prepared(track(limited, f"scoring by {chosen.name}", total), device))
        try:
            evidence = chosen.gather(model, groups, stream, loss)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            pass_on_exhaustion(error)
            raise ConfigError(f"criterion {chosen.name!r} fails on the loader's batches: {one_line(error)}") from error
    if passed.number == 0:
        raise DataError(f"criterion {chosen.name!r}: the loader gave no batch")
    return evidence


class _Passed:
    number = 0

    def count(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        for batch in stream:
            self.number += 1
            yield batch


def _prepared(loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    for batch in loader:
        pair = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        inputs, targets = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tuple(pair))
        yield inputs, targets


def _checked(chosen: Criterion, group: ChannelGroup, scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (group.size,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"criterion {chosen.name!r} gave {got} for the {group.size} units of group {group.name!r}")
    return scores.detach().double().cpu()
