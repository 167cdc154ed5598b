"""What online clustering adds to a training epoch of VGG-16: the pull in every batch, an update once an epoch.

Steps with and without the pull alternate, on random images of CIFAR-10's size; medians. An epoch is taken as
50,000 / batch steps. Writes results/online_overhead.json.

    python benchmarks/online_overhead.py [--width 0.25] [--steps 30] [--device cpu] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

BATCH, IMAGES = 128, 50_000


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/online_overhead.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import torch

    from filterfold.storage import write_json

    torch.set_num_threads(options.threads)
    report = measure(options.width, options.steps, options.device)
    report["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else platform.machine(),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(report)
    write_json(options.output, report)


def measure(width: float, steps: int, device: str) -> dict:
    """Seconds of a plain step, of the pull, of an update; their share of an epoch."""
    import torch
    from torch.nn.functional import cross_entropy

    from filterfold.online import OnlineFilterClustering
    from filterfold.zoo import build

    torch.manual_seed(0)
    model = build("vgg16", width=width).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    online = OnlineFilterClustering(model, torch.zeros(1, 3, 32, 32, device=device), optimizer, keep=0.5)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)

    def step(pulled: bool) -> None:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        (loss + online.loss() if pulled else loss).backward()
        optimizer.step()

    def timed(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first = timed(online.update_clusters)
    for pulled in (False, True):
        step(pulled)
    plain, both = [], []
    for _ in range(steps):
        plain.append(timed(lambda: step(False)))
        both.append(timed(lambda: step(True)))
    update = [timed(online.update_clusters) for _ in range(3)]
    extra = [two - one for one, two in zip(plain, both, strict=True)]
    batches = IMAGES / BATCH
    epoch = statistics.median(plain) * batches
    return {
        "what": f"VGG-16, width {width}, batch {BATCH}",
        "steps": steps,
        "seconds": {
            "step": spread(plain),
            "step with pull": spread(both),
            "pull (difference of neighbours)": spread(extra),
            "first update": first,
            "update": spread(update),
        },
        "share of an epoch": (statistics.median(extra) * batches + statistics.median(update)) / epoch,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
