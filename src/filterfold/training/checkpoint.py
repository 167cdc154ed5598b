"""The checkpoint of a run: written after every epoch, and resumed only by the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..data import ImageData
from ..errors import CheckpointError, ConfigError
from ..surgery.layer_attributes import restore, snapshot
from ..utils.io import load_tree, save_tree
from .recipe import Recipe
from .run import Callback, Run

FORMAT = 1


def identify(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    callbacks: Sequence[Callback],
    optimizer: Optimizer | None,
    phase: str,
) -> dict[str, Any]:
    """What must be equal for a run to resume from a checkpoint: everything that the final weights depend on.

    Of the network it is the structure at the start of the run.
    """
    labels = hashlib.sha256(data.train.labels.cpu().numpy().tobytes()).hexdigest()[:16]
    return {
        "phase": phase,
        "recipe": recipe.to_dict(),
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "image": [data.channels, data.image_size, data.image_size],
            "train": len(data.train),
            "labels": labels,
            "images": [data.train.fingerprint, data.validation.fingerprint],
            "augment": data.augment,
            "normalization": [list(values) for values in data.train.normalization],
        },
        "callbacks": [type(callback).__name__ for callback in callbacks],
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
        "model": snapshot(model)["tensors"],
    }


def save(path: Path, run: Run, callbacks: Sequence[Callback], identity: Mapping[str, Any]) -> None:
    """Write the run's state after a whole epoch, atomically."""
    tree = {
        "format": FORMAT,
        "identity": dict(identity),
        "epoch": run.epoch,
        "step": run.step,
        "history": run.history.rows,
        "structure": snapshot(run.model),
        "model": dict(run.model.state_dict()),
        "optimizer": run.optimizer.state_dict(),
        "precision": dict(run.fabric.strategy.precision.state_dict()),
        "callbacks": [callback.state_dict() for callback in callbacks],
    }
    if run.averaged is not None:
        tree["averaged"] = dict(run.averaged.state_dict())
    save_tree(path, tree)


def read(path: Path | None, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint and make sure that it is of the same run; None if there is none.

    **Raises:** `CheckpointError` if it is damaged, `ConfigError` naming the first difference if it is of another run.
    """
    if path is None or not path.exists():
        return None
    tree = load_tree(path)
    parts = ("identity", "epoch", "step", "history", "structure", "model", "optimizer", "precision", "callbacks")
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or any(part not in tree for part in parts):
        raise CheckpointError(f"{path}: not a training checkpoint of this version; delete it to start afresh")
    here = dict(identity)
    if "images" not in tree["identity"]["data"]:  # of a version that did not look at them
        here["data"] = {name: value for name, value in here["data"].items() if name != "images"}
    difference = _difference(tree["identity"], here)
    if difference is not None:
        raise ConfigError(
            f"{path} is the checkpoint of another run: {difference}; give another path, or delete it to start afresh"
        )
    return tree


def resize(model: nn.Module, tree: Mapping[str, Any]) -> None:
    """Give the network the sizes that it had when the checkpoint was written."""
    restore(model, tree["structure"])


def resume(path: Path | str, run: Run, tree: Mapping[str, Any]) -> None:
    """Load weights, optimizer, loss scaling and history; the network has been resized already."""
    try:
        run.model.load_state_dict(tree["model"])
        run.optimizer.load_state_dict(tree["optimizer"])
        if run.averaged is not None:
            run.averaged.load_state_dict(tree["averaged"])
        run.fabric.strategy.precision.load_state_dict(tree["precision"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: the state does not fit the run ({reason}); delete it to start afresh"
        ) from error
    run.epoch, run.step = tree["epoch"], tree["step"]
    run.history.rows[:] = tree["history"]


def _difference(there: Any, here: Any, where: str = "") -> str | None:
    """The first place where two trees of plain values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            found = _difference(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
            if found is not None:
                return found
        return None
    if _plain(there) == _plain(here):
        return None
    return f"{where} is {_short(there)} there, {_short(here)} here"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
