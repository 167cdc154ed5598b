"""`filterfold train` and `filterfold evaluate`."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from ..errors import RecordError, TrainingError
from .compare import UNFINISHED, default_folder
from .display import change, count, live, say, table
from .figures import Figures
from .options import (
    DataOptions,
    Device,
    ModelOptions,
    OnlineOptions,
    Overwrite,
    Precision,
    RunOptions,
    Threads,
    TrainingOptions,
    setting_of,
    use_threads,
)
from .teacher import DistillationOptions
from .weights import StartOptions, WeightOptions

if TYPE_CHECKING:
    from ..bench.trials.config import Comparison, Trial
    from ..bench.trials.records import Record
    from ..bench.trials.runner import Outcome


EXAMPLES = """
Examples:

  filterfold train --model vgg_small --data digits --epochs 20 --lr 0.1 --schedule onecycle

  filterfold train --model resnet56 --data cifar10 --out runs/resnet56

  filterfold train --model vgg16 --data cifar10 --method online --clusters 30

  filterfold train --model vgg_small --data digits --log tensorboard

  filterfold train --model timm:resnet18 --pretrained --new-head --data path/to/images --epochs 5 --lr 0.01

  filterfold train --model timm:resnet18 --pretrained --new-head --data path/to/images --epochs 5 --lr 0.01 \
    --method online-reconstruction-then-train+repair --macs 0.5

  filterfold train --model timm:resnet18 --weights resnet18.safetensors --new-head --data cifar10 --image-size 64

  filterfold train --model my_models.py:small_net --data path/to/images --image-size 64
"""


def train(
    chosen: ModelOptions,
    beginning: StartOptions,
    images: DataOptions,
    training: TrainingOptions,
    clustering: OnlineOptions,
    teaching: DistillationOptions,
    running: RunOptions,
    method: Annotated[
        str, Option(help="dense; online: fold clusters of filters while training; or l1: train, cut once, retrain.")
    ] = "dense",
    clusters: Annotated[int | None, Option(help="online: filters left in every layer.")] = None,
    keep: Annotated[float | None, Option(help="Share of the filters that stays.")] = None,
    macs: Annotated[float | None, Option(help="Share of the multiply-accumulates that stays.")] = None,
    retrain_epochs: Annotated[int, Option(hidden=True, help="l1 and other criteria: epochs after the cut.")] = 40,
    seed: Annotated[int, Option(help="Of initial weights, batches and augmentation.")] = 0,
    out: Annotated[Path | None, Option(help="Run folder.", show_default="runs/METHOD-MODEL-DATA")] = None,
    overwrite: Overwrite = False,
) -> Figures:
    """Train a network, from fresh weights or from trained ones, and evaluate it on the test images.

    A run that was stopped (Ctrl-C, kill, --stop-after) goes on with the same command and ends with the same weights.
    """
    from ..bench.trials.config import Comparison, Trial

    start, images = beginning.settle(chosen.model, images)
    [method] = teaching.methods([method])
    others = {"weights": start.weights, "start": start.entries, "distill": teaching.setting()}
    setting = setting_of(chosen, images, training, clustering, retrain_epochs=retrain_epochs, **others)
    trial = Trial(method, seed, setting, clusters, keep, macs)
    folder = out or default_folder(setting, method)
    comparison = Comparison(setting, (trial,))
    if not overwrite:
        _refuse_another(comparison, folder)
    outcome = running.run(comparison, folder, cache_dir=images.cache_dir, fresh=overwrite)
    return _figures(trial, outcome, folder)


def _refuse_another(comparison: Comparison, folder: Path) -> None:
    """Refuse a folder with another run in it, finished or not: its own command is to go on there."""
    from ..bench.trials.config import FILE, description

    if not (folder / FILE).exists():
        return
    found = description(folder)
    held, [trial] = found["trials"], comparison.trials
    if trial.id not in held:
        other = next(iter(held.values()))
        what = comparison.difference(found) or f"{other['method']}, seed {other['seed']}"
        raise RecordError(f"{folder} holds another run ({what}); give another --out, or --overwrite to replace it")


def _figures(trial: Trial, outcome: Outcome, folder: Path) -> Figures:
    """Copy the network to its place; what the trial came to."""
    from ..utils.io import write_atomically

    if outcome.failed:
        if bug := outcome.failed[0]["environment"].get("traceback"):
            typer.echo(bug, err=True)
        raise TrainingError(f"{trial.label} seed {trial.seed} failed: {outcome.failed[0]['reason']}")
    if outcome.left:
        say(f"stopped in time; the same command goes on from here ({folder})")
        raise typer.Exit(UNFINISHED)
    network = folder / "model.safetensors"
    source = folder / "models" / f"{trial.id}.safetensors"
    if not source.exists():
        raise RecordError(f"{source}: the network of this run is gone; --overwrite trains it again")
    write_atomically(network, lambda temporary: shutil.copyfile(source, temporary))
    record = outcome.records[0]
    shown = ("label", "model", "data", "seed", "result", "dense", "timing")
    document = {name: entry for name, entry in record.items() if name in shown}
    found = Figures(document, partial(_show, record), 0 if outcome.timed else UNFINISHED)
    return found.adding(network=network, record=folder / "records" / f"{trial.id}.json")


def _show(record: Record) -> None:
    result, dense = record["result"], record["dense"]
    assert result is not None
    assert dense is not None
    seconds = result["inference_seconds"]
    rows = [
        ("top-1 (test)", f"{result['top1']:.2f} %", ""),
        ("top-5 (test)", f"{result['top5']:.2f} %", ""),
        ("MACs", count(result["macs"]), change(dense["macs"], result["macs"])),
        ("parameters", count(result["parameters"]), change(dense["parameters"], result["parameters"])),
        ("inference, test set", "not timed" if seconds is None else f"{seconds:.3g} s", ""),
        ("training", f"{result['train_seconds']:.1f} s", ""),
    ]
    table(f"{record['label']}: {record['model']} on {record['data']}, seed {record['seed']}", ("", "", ""), rows)


EVALUATE_EXAMPLES = """
Examples:

  filterfold evaluate --model resnet56 --weights resnet56-cifar10.safetensors --data cifar10 --normalization imagenet

  filterfold evaluate --model vgg16 --weights pruned.safetensors --data cifar10
"""


def evaluate(
    chosen: ModelOptions,
    images: DataOptions,
    trained: WeightOptions,
    batch_size: Annotated[int, Option(help="Images at a time; changes speed and memory only.", min=1)] = 500,
    precision: Precision = "32-true",
    device: Device = "auto",
    threads: Threads = None,
) -> Figures:
    """Evaluate a network on the test images: top-1, top-5, loss, cost."""
    import torch

    from ..bench.trials.context import resolve
    from ..profiling.macs import measure
    from ..training import evaluate as run

    use_threads(threads)
    device = resolve(device)
    with live():
        found = trained.network(chosen, images, device)
        model, data = found.model, found.data
        size = data.image_size
        cost = measure(model, torch.zeros(1, data.channels, size, size, device=device))
        metrics = run(
            model, data.test, batch_size=batch_size, device=device, precision=precision, classes=len(data.classes)
        )
    rows = [
        ("top-1", f"{metrics.top1:.2f} %"),
        ("top-5", f"{metrics.top5:.2f} %"),
        ("loss", f"{metrics.loss:.4f}"),
        ("MACs", count(cost.macs)),
        ("parameters", count(cost.parameters)),
    ]
    title = f"{chosen.model} with {trained.name} on {metrics.images} test images of {data.name}"
    about = {"model": chosen.model, "weights": trained.name, "data": data.name, "macs": cost.macs}
    document = {**about, "parameters": cost.parameters, **asdict(metrics)}
    return Figures(document, partial(table, title, ("", ""), rows))
