"""Running a model on calibration images, and measuring its batch norms anew."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from ...errors import ConfigError, DataError, ModelError
from ...utils.inputs import call
from ...utils.model_state import preserved, random_state_preserved
from ...utils.modules import named_tensors, unwrap
from ...utils.progress import track


class ReachedError(Exception):
    """Thrown out of a forward pass at the layer that is looked at: what follows is not needed."""


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
    return found


def run(model: nn.Module, inputs: Any) -> None:
    """Call the model; whatever goes wrong becomes a `ModelError`."""
    try:
        call(model, inputs)
    except ReachedError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} can't run on a batch of the loader: {reason}") from error


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
