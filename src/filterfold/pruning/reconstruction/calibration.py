"""Running a model on calibration images, and measuring its batch norms anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import ConfigError, DataError, FilterfoldError, ModelError, pass_on_exhaustion
from ...utils.arguments import typed
from ...utils.inputs import batch_of, call
from ...utils.model_state import preserved, random_state_preserved
from ...utils.modules import leaves, named_tensors, unwrap
from ...utils.progress import track

MEMORY = 4 * 2**30
"""Bytes that the activations of one pass may take at once, at most: so many images are used."""


_LEAST = 8
"""Images that are used whatever they take."""


class ReachedError(Exception):
    """Thrown out of a forward pass: what follows is not needed."""


@dataclass(frozen=True, slots=True)
class Images:
    """Batches as one.

    **Arguments:**

    - `inputs`: what the model is called with.
    - `count`: how many examples these are; 1 where they have no common first axis.
    - `given`: how many there were in all batches.
    """

    inputs: Any
    count: int
    given: int

    @classmethod
    def of(cls, batches: Sequence[Any]) -> Images:
        """Join the batches; those that have other shapes, or other content that is no tensor, are left out."""
        counts = [batch_of(batch) for batch in batches]
        given = sum(count or 1 for count in counts)
        if counts[0] is None:
            return cls(batches[0], 1, given)
        leaves, form = tree_flatten(batches[0])
        marks = _marks(leaves, counts[0])
        joined = [[leaf] if mark is not None else leaf for leaf, mark in zip(leaves, marks, strict=True)]
        total = counts[0]
        for batch, count in zip(batches[1:], counts[1:], strict=True):
            others, other_form = tree_flatten(batch)
            if (
                count is None
                or other_form != form
                or _marks(others, count) != marks
                or not _same(leaves, others, marks)
            ):
                continue
            total += count or 0
            for place, leaf in enumerate(others):
                if marks[place] is not None:
                    joined[place].append(leaf)
        parts = [torch.cat(leaf) if mark is not None else leaf for leaf, mark in zip(joined, marks, strict=True)]
        return cls(tree_unflatten(parts, form), total, given)

    def first(self, count: int) -> Images:
        """The first examples."""
        if count >= self.count:
            return self

        def taken(leaf: Any) -> Any:
            return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.count else leaf

        return Images(tree_map(taken, self.inputs), count, self.given)

    def that_fit(self, used: int, images: int) -> Images:
        """As many as `MEMORY` allows, where `images` of them took `used` bytes."""
        return self.first(max(_LEAST, int(MEMORY / max(1, used / images))))


def _marks(leaves: Sequence[Any], count: int) -> list[Any]:
    """For every leaf that has a row for each example, what its batches must have in common; None for others."""
    return [
        (leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else None
        for leaf in leaves
    ]


def _same(first: Sequence[Any], second: Sequence[Any], marks: Sequence[Any]) -> bool:
    """Whether what is not joined is equal."""
    return all(
        (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b))
        for a, b, mark in zip(first, second, marks, strict=True)
        if mark is None
    )


def gathered(model: nn.Module, loader: Iterable[Any], batches: int) -> list[Any]:
    """The inputs of the first batches, on the model's device."""
    if batches < 1:
        raise ConfigError(f"batches={batches}: at least 1")
    device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
    found = []
    for batch in islice(loader, batches):
        inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch
        found.append(tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs))
    if not found:
        raise DataError("the loader gave no batch to measure on")
    if any(tensor.isnan().any() for tensor in leaves(found) if tensor.is_floating_point()):
        raise DataError("the loader gave NaN, with which nothing can be measured")
    return found


def run(model: nn.Module, inputs: Any) -> None:
    """Call the model; whatever goes wrong becomes a `ModelError`."""
    try:
        call(model, inputs)
    except (ReachedError, FilterfoldError):
        raise
    except Exception as error:
        pass_on_exhaustion(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} can't run on a batch of the loader: {reason}") from error


@typed
def reestimate(model: nn.Module, loader: Iterable[Any], *, batches: int = 10) -> int:
    """Measure the running statistics of all batch norms anew, each batch counting the same.

    Only `running_mean` and `running_var` change, in place; dropout stays off. A batch norm that the network does not
    run keeps its statistics.

    **Arguments:**

    - `model`: any module. Its modes, momenta and hooks, and the random state, are afterwards as before.
    - `loader`: gives `(inputs, targets)` or inputs; inputs are a tensor, a tuple or a mapping, and are moved to the
      model's device. Best training images without augmentation, in batches of 100 or more.
    - `batches`: use at most so many.

    **Returns:** the number of batch norms measured.

    **Raises:** `DataError` for an empty loader, `ModelError` if the model can't run on a batch.

    ```python
    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    1
    >>> net[0].running_mean.item(), net[0].running_var.item()
    (4.0, 2.0)

    ```
    """
    model = unwrap(model)
    with random_state_preserved(model):
        return measure_norms(model, gathered(model, loader, batches))


def measure_norms(model: nn.Module, inputs: list[Any]) -> int:
    """`reestimate` on inputs at hand."""
    norms: list[Any] = [module for module in model.modules() if is_tracked(module)]
    before = [
        tuple(value.clone() for value in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
        for norm in norms
    ]
    reached = [False] * len(norms)
    try:
        with preserved(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative average
                norm.train()
            for batch in track(inputs, "measuring batch norms", len(inputs)):
                run(model, batch)
            reached = [int(norm.num_batches_tracked) > 0 for norm in norms]
    finally:
        for norm, (mean, var, count), new in zip(norms, before, reached, strict=True):
            norm.num_batches_tracked.copy_(count)
            if not new:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
    return sum(reached)


def is_tracked(norm: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return (
        isinstance(norm, _BatchNorm)
        and getattr(norm, "running_mean", None) is not None
        and getattr(norm, "running_var", None) is not None
    )
