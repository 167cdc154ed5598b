"""What the tests start in two processes. Every process writes what it saw as JSON.

torchrun --nproc-per-node 2 program.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from filterfold import data, zoo
from filterfold.errors import TrainingError
from filterfold.online import OnlineCallback
from filterfold.surgery.layer_attributes import snapshot
from filterfold.training import Callback, Recipe, Run, evaluate, train
from filterfold.training.fabric import lead_or_follow
from filterfold.training.loop import work
from filterfold.utils import distributed

sys.path.insert(0, str(Path(__file__).parent))
import plain_ddp

LABELS_OF = 3
"""Batches whose labels are noted."""


def digest(model: nn.Module) -> str:
    """A fingerprint of every bit of a network."""
    parts = (f"{name} {tuple(t.shape)}".encode() + t.numpy().tobytes() for name, t in model.state_dict().items())
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Watch(Callback):
    """Notes labels; stops the run after an epoch."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def on_start(self, run: Run) -> None:
        self.optimizer = run.optimizer

    def on_batch_loss(self, run: Run) -> None:
        if run.batch is not None and len(self.labels) < LABELS_OF:
            self.labels.append(run.batch.labels.tolist())


class EnoughError(Exception):
    """The time is up."""


def plain() -> nn.Module:
    """No batch norm, so that the parts of a batch add up to the batch; and a parameter that no gradient reaches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    return model


def small() -> nn.Module:
    torch.manual_seed(distributed.rank())  # rank 0's weights are to be everybody's
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.5)


def exact(_folder: Path) -> dict[str, Any]:
    """Batches of odd size, shared by two."""
    digits, model, watch = data.load("digits", train_limit=200), plain(), Watch()
    recipe = Recipe(epochs=2, batch_size=33, lr=0.05, momentum=0.9, seed=3)
    rows = train(model, digits, recipe, callbacks=[watch], device="cpu").rows
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return {"labels": watch.labels, "weights": weights, "losses": [row["train_loss"] for row in rows]}


def online(folder: Path) -> dict[str, Any]:
    """Clustering while training: undisturbed, and stopped by rank 0 and taken up again."""
    digits, seen = data.load("digits"), []
    recipe = Recipe(epochs=6, batch_size=64, lr=0.1, schedule="onecycle")

    def enough(_seconds: float) -> None:
        if distributed.is_first() and len(seen) == 3:
            raise EnoughError("three epochs")

    def run(checkpoint: Path | None, check: Any) -> tuple[nn.Module, OnlineCallback, Any, Watch]:
        model, callback, watch = small(), OnlineCallback(keep=0.5, schedule="gradual"), Watch()
        history = train(
            model,
            digits,
            recipe,
            callbacks=[callback, watch],  # type: ignore[list-item]
            observers=[lambda row: seen.append(row["epoch"])] if check else [],
            checkpoint=checkpoint,
            check=check,
            device="cpu",
        )
        return model, callback, history, watch

    model, callback, history, watch = run(None, None)
    path, stopped = folder / f"checkpoint-{distributed.rank()}.safetensors", ""
    try:
        run(path, enough)
    except EnoughError as error:
        stopped = str(error)
    again, *_ = run(path, None)
    assert callback.online is not None
    assert watch.optimizer is not None
    momentum = [value["momentum_buffer"] for value in watch.optimizer.state_dict()["state"].values()]
    return {
        "structure": snapshot(model),
        "weights": digest(model),
        "plans": [plan.to_json() for plan in callback.online.plans],
        "momentum": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in momentum)).hexdigest(),
        "events": [row["events"] for row in history.rows],
        "validation": history.last_top1,
        "whole_validation": evaluate(model, digits.validation).top1,
        "test": evaluate(model, digits.test).top1,
        "stopped": stopped,
        "observed": seen,
        "wrote": path.exists(),
        "resumed": digest(again),
        "checkpoint": str(path),
    }


def averaged(_folder: Path) -> dict[str, Any]:
    """Cuts between batches, with a moving average."""
    model, callback = small(), OnlineCallback(keep=0.5, schedule="0.2,0.4")
    recipe = Recipe(epochs=2, batch_size=64, lr=0.002, optimizer="adamw", ema=0.9, clip=1.0)
    train(model, data.load("digits", train_limit=320), recipe, callbacks=[callback], device="cpu")  # type: ignore[list-item]
    return {"structure": snapshot(model), "weights": digest(model)}


def handed_out(_folder: Path) -> dict[str, Any]:
    """Rank 0 hands out work that can't be sent, and then some that can."""
    said: dict[str, Any] = {}

    def command() -> None:
        class Local(Callback):
            pass

        digits, recipe = data.load("digits", train_limit=100), Recipe(epochs=1, batch_size=50)
        try:
            train(small(), digits, recipe, callbacks=[Local()], device="cpu")
        except TrainingError as error:
            said["refused"] = str(error)
        said["epochs"] = len(train(small(), digits, recipe, device="cpu").rows)

    lead_or_follow(command, work)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, number = Path(sys.argv[1]), int(os.environ["RANK"])
    found = {task.__name__: task(where) for task in (exact, online, averaged, plain_ddp.run)}
    found["count"] = distributed.world_size()
    found["handed_out"] = handed_out(where)  # and leaves the others
    (where / f"{number}.json").write_text(json.dumps(found))
