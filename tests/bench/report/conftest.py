"""A factory of records that look like those of a real comparison."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

LAYERS = {
    f"features.{i}": width for i, width in enumerate((64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512))
}
DENSE = {"macs": 313_201_664, "parameters": 14_987_722, "weights": 14_978_752}

ENVIRONMENT = {
    "filterfold": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "processor": "A CPU",
    "device": "cpu",
    "threads": 2,
    "commit": "0123abc",
    "dirty": False,
    "packages": {"numpy": "2.4.6"},
}

Factory = Callable[..., dict[str, Any]]


def make_record(method: str = "dense", seed: int = 0, clusters: int | None = None, **changes: Any) -> dict[str, Any]:
    """One finished trial; `changes` replace entries of the record, or of its result."""
    rng = random.Random(f"{method} {clusters} {seed}")
    kept = {"dense": 1.0, "l1": 0.55, "random": 0.55, "scratch": 0.55}.get(method, 0.35 + 0.015 * (clusters or 10))
    share = kept**1.8
    epochs, retrain = 30, 12 if method in ("l1", "random") else 0
    top1 = 93.4 - 4 * (1 - share) * {"l1": 0.05, "random": 0.5, "scratch": 0.25}.get(method, 0.12) + rng.gauss(0, 0.15)
    history = [
        _epoch(method, rng, epoch, epochs, share, retrain > 0 and epoch >= epochs) for epoch in range(epochs + retrain)
    ]
    label = method if clusters is None else f"{method} k={clusters}"
    record: dict[str, Any] = {
        "format": 1,
        "id": f"{label.replace(' ', '-')}-s{seed}",
        "status": "finished",
        "reason": None,
        "method": method,
        "label": label,
        "clusters": clusters,
        "model": "vgg16",
        "data": "cifar10",
        "seed": seed,
        "options": {"keep": None, "width": 1.0, "recipe": {"epochs": epochs, "lr": 0.02}, "round_to": 1},
        "result": {
            "top1": top1,
            "top5": 99.5 + rng.gauss(0, 0.06),
            "inference_seconds": 4.2 * (0.12 + 0.88 * share) * (1 + abs(rng.gauss(0, 0.015))),
            "macs": round(DENSE["macs"] * share),
            "parameters": round(DENSE["parameters"] * share),
            "weights": round(DENSE["weights"] * share),
            "train_seconds": sum(entry["seconds"] for entry in history),
            "train_images": 44_928 * len(history),
            "train_macs": 3 * 44_928 * sum(entry["macs"] for entry in history),
            "best_top1": top1 + 0.1,
            "widths": {name: [w, round(w * (kept if name != "features.0" else 1))] for name, w in LAYERS.items()},
        },
        "dense": dict(DENSE),
        "history": history,
        "clusters_history": _clusterings(rng, clusters) if method == "online" else [],
        "timing": {
            "mode": "together",
            "rounds": [4.2],
            "batch_size": 128,
            "device": "cpu",
            "together_with": "abc",
            "control": 1.004,
            "controls": {"1": 1.01, "8": 0.99, "64": 1.0, "512": 1.02},
            "batches": {str(size): _calls(rng, size, share) for size in (1, 8, 64, 512)},
        },
        "environment": dict(ENVIRONMENT),
        "command": "filterfold compare --data cifar10 --model vgg16",
        "started": f"2026-01-0{1 + seed % 9}T10:00:00+00:00",
        "finished": f"2026-01-0{1 + seed % 9}T11:00:00+00:00",
    }
    if share < 1:
        record["timing"]["wasted"] = [
            f"{name}: 64 -> 35 channels take 1.5 ms, 64 -> 48 would take 1.4 ms" for name in LAYERS
        ]
    for key, entry in changes.items():
        (record["result"] if key in record["result"] else record)[key] = entry
    return record


def _calls(rng: random.Random, size: int, share: float) -> list[float]:
    """Seconds a call in five rounds: the larger the batch, the more the work counts."""
    overhead = 0.6 / size**0.4
    typical = 4.2e-4 * size * (overhead + (1 - overhead) * share)
    return [typical * (1 + abs(rng.gauss(0, 0.02))) for _ in range(5)]


def _epoch(method: str, rng: random.Random, epoch: int, epochs: int, share: float, retrain: bool) -> dict[str, Any]:
    cuts = sum(epoch >= at for at in (10, 16, 21)) if method == "online" else 3 * retrain
    cuts = 3 if method == "scratch" else cuts
    left = 1 - (1 - share) * cuts / 3
    hurt = 6 if epoch in (10, 16, 21) and method == "online" else 0
    top1 = 93.5 - 55 * 0.83**epoch - 2 * (1 - left) - hurt + rng.gauss(0, 0.4)
    return {
        "phase": "retrain" if retrain else "train",
        "epoch": epoch - epochs if retrain else epoch,
        "train_loss": 0.03 + 2.2 * 0.86**epoch + hurt / 20,
        "validation_top1": top1,
        "learning_rate": 0.02,
        "seconds": 14 * (0.2 + 0.8 * left),
        "macs": round(DENSE["macs"] * left),
        "events": ["clusters updated"] if method == "online" else [],
    }


def _clusterings(rng: random.Random, clusters: int | None) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "group": name,
            "k": clusters or 10,
            "inertia": 1.0 / (epoch + 1),
            "cosine": 0.35 + 0.05 * epoch**0.7 + 0.001 * (clusters or 10) + rng.gauss(0, 0.004),
            "changed": max(0, 40 - 2 * epoch),
        }
        for epoch in range(0, 21, 2)
        for name in LAYERS
    ]


@pytest.fixture(scope="session")
def make() -> Factory:
    """`make("online", seed, clusters)` makes one record."""
    return make_record


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    """A comparison of seven settings with five seeds, two of whose trials failed."""
    made = [make_record(method, seed) for method in ("dense", "l1", "random", "scratch") for seed in range(5)]
    made += [make_record("online", seed, k) for k in (5, 15, 30) for seed in range(5)]
    made[7] |= {"status": "failed", "reason": "out of memory <at> layer 3", "result": None}
    failed = make_record("online", 0, 50) | {"status": "failed", "reason": "diverged: the loss is nan", "result": None}
    return [*made, failed]
