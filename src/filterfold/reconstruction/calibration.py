"""Batches to measure on, and running a network on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ConfigError, DataError, ModelError
from ..modes import call
from ..structure import named_tensors


class ReachedError(Exception):
    """Thrown out of a forward pass at the layer that is looked at: what follows is not needed."""


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Give back the random state of the CPU and of the model's devices."""
    devices = sorted({tensor.device.index for _, tensor in named_tensors(model) if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield


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
