"""What data costs: decoding CIFAR-10 once, reading it from the cache, and its share of a training epoch.

The share is that of order, crop, flip and normalisation in an epoch of a quarter-width VGG-16 at batch 128. Data
and training steps are timed in turn, round by round; a step is forward, backward and SGD on a batch that is ready.
Shares are of processor time, which other work on the machine hardly changes; wall time is given beside it, and the
load average before and after, because wall time means something only where that is below the processors. Loading runs
in fresh processes, with empty caches for the cold ones; imports are not counted. Writes medians and spread to
results/data_overhead.json.

    python benchmarks/data_overhead.py --data ../shared/data/cifar10 [--rounds 5] [--threads 1] [--steps 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOAD = """
import sys, time, torch, filterfold.data
torch.set_num_threads(int(sys.argv[3]))
wall, processor = time.perf_counter(), time.process_time()
print(filterfold.data.load(sys.argv[1], cache_dir=sys.argv[2]), file=sys.stderr)
print(time.perf_counter() - wall, time.process_time() - processor)
"""
BARS = {"decode_seconds": 20.0, "cached_seconds": 2.0, "overhead_percent": 5.0}


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="what filterfold.data.load finds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="training steps a round")
    parser.add_argument("--output", type=Path, default=Path("results/data_overhead.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    from filterfold.utils.environment import describe
    from filterfold.utils.io import write_json

    report: dict[str, Any] = {"bars": BARS, "load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as cache:
        report |= loading(options.data, cache, options.rounds, options.threads)
        for precision in ("32-true", "bf16-mixed"):
            report[f"epoch_{precision}"] = epoch(options, cache, precision)
    report["load_average_after"] = os.getloadavg()
    report["environment"] = describe()
    for key, value in report.items():
        print(key, value)
    write_json(options.output, report)
    print("written:", options.output)


def loading(source: str, cache: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds to decode everything with empty caches, and to read it back."""
    cold = []
    for _ in range(max(3, rounds // 2)):
        with tempfile.TemporaryDirectory() as empty:
            cold.append(fresh(source, empty, empty, threads))
    fresh(source, cache, cache, threads)
    warm = [fresh(source, cache, cache, threads) for _ in range(rounds)]
    return {"decode_seconds": both(cold), "cached_seconds": both(warm)}


def fresh(source: str, cache: str, hub_cache: str, threads: int) -> tuple[float, float]:
    """Wall and processor seconds of `load` in a new process."""
    environment = {**os.environ, "HF_DATASETS_CACHE": f"{hub_cache}/datasets"}
    command = [sys.executable, "-c", LOAD, source, cache, str(threads)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    wall, processor = map(float, done.stdout.split())
    return wall, processor


def epoch(options: argparse.Namespace, cache: str, precision: str) -> dict[str, Any]:
    """Seconds of an epoch's data and of its training steps, and the share of the former."""
    import torch

    from filterfold import data, zoo

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = data.load(options.data, cache_dir=cache)
    model = zoo.build("vgg16", width=0.25, classes=len(images.classes), channels=images.channels).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    batch = next(data.batches(images.train, 128, shuffle=True, augment=images.augment))
    batches = len(images.train) // 128
    feeding, stepping = [], []
    for number in range(options.rounds + 1):  # the first round warms up and is thrown away
        feeding.append(feed_seconds(images, number))
        wall, processor = step_seconds(model, optimizer, batch, options.steps, precision)
        stepping.append((wall * batches, processor * batches))
    shares = [100 * fed[1] / (fed[1] + trained[1]) for fed, trained in zip(feeding[1:], stepping[1:], strict=True)]
    return {
        "batches": batches,
        "data_seconds": both(feeding[1:]),
        "training_seconds": {**both(stepping[1:]), "extrapolated_from_steps": options.steps},
        "overhead_percent": summary(shares),
    }


def feed_seconds(images: Any, number: int) -> tuple[float, float]:
    """Wall and processor seconds to run through the training split once, augmented."""
    from filterfold import data

    wall, processor = time.perf_counter(), time.process_time()
    for _ in data.batches(images.train, 128, shuffle=True, augment=images.augment, epoch=number, drop_last=True):
        pass
    return time.perf_counter() - wall, time.process_time() - processor


def step_seconds(model: Any, optimizer: Any, batch: Any, steps: int, precision: str) -> tuple[float, float]:
    """Wall and processor seconds of one training step."""
    import torch

    images, labels = batch
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


def both(values: list[tuple[float, float]]) -> dict[str, Any]:
    """Summaries of wall and of processor time."""
    return {"wall": summary([wall for wall, _ in values]), "processor": summary([cpu for _, cpu in values])}


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and number."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


if __name__ == "__main__":
    main()
