"""Networks with weights, from whatever file the user has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, RecordError

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_HELP = "Weights: safetensors or a torch state dict, by name; or a network that Filterfold saved, pruned or not."


def with_weights(factory: Callable[[], nn.Module], weights: Path, device: str) -> nn.Module:
    """A network with the weights of a file: one of Filterfold's, whose sizes it takes on, or a plain state dict.

    **Raises:** `CheckpointError` naming what does not fit.
    """
    from ..checkpoint import inspect, load, load_weights

    try:
        inspect(weights)
    except CheckpointError:
        model = factory()
        load_weights(model, weights)
        return model.to(device)
    return load(weights, factory, device=device)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write over a file unasked."""
    if path.exists() and not overwrite:
        raise RecordError(f"{path} exists; give another --out, or --overwrite to replace it")
