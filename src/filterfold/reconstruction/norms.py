"""Batch norms' statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modes import undisturbed
from ..progress import track
from ..structure import unwrap
from .calibration import gathered, random_state_kept, run


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
    with random_state_kept(model):
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
        with undisturbed(model), torch.no_grad():
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
