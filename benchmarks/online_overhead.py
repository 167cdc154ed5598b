"""What online clustering adds to a training epoch of VGG-16: the pull in every batch, an update once an epoch.

Each pull's own work, as it is done in the library's training loop, is timed after a training step on random images of
CIFAR-10's size, in turn; medians of processor time on a CPU, of wall time on a GPU. An epoch is taken as 50,000 / batch
steps. Updates are counted as if each chose the widths of all layers under a budget of MACs anew, which happens twice a
milestone only. Writes results/online_overhead.json.

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

    from filterfold.utils.io import write_json

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
    """Seconds of a plain step, of the pulls, of an update; their share of an epoch."""
    import torch
    from torch.nn.functional import cross_entropy

    from filterfold.online import OnlineFilterClustering
    from filterfold.zoo import build

    torch.manual_seed(0)
    model = build("vgg16", width=width).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    example = torch.zeros(1, 3, 32, 32, device=device)
    pulls = {
        pull: OnlineFilterClustering(model, example, optimizer, keep=0.5, pull=pull)
        for pull in ("cosine", "centripetal")
    }
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    work = {
        "cosine": pulls["cosine"].add_gradients,
        "centripetal": pulls["centripetal"].merge_gradients,
    }
    clock = time.process_time if device == "cpu" else time.perf_counter

    def timed(run: Callable[[], object]) -> float:
        begin = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - begin

    first = timed(pulls["cosine"].update_clusters)
    pulls["centripetal"].update_clusters()
    plain: list[float] = []
    added: dict[str, list[float]] = {pull: [] for pull in pulls}
    for index in range(steps + 1):
        plain.append(timed(step))
        for pull, own in work.items():
            added[pull].append(timed(own))
        if not index:  # warm-up
            for values in (plain, *added.values()):
                values.clear()
    update = [timed(pulls["cosine"].update_clusters) for _ in range(3)]
    choosing = OnlineFilterClustering(model, example, optimizer, macs=0.26)
    chosen = timed(choosing.update_clusters), timed(choosing.update_clusters)
    batches = IMAGES / BATCH
    epoch = statistics.median(plain) * batches
    return {
        "what": f"VGG-16, width {width}, batch {BATCH}",
        "steps": steps,
        "seconds": {
            "step": spread(plain),
            **{f"{pull} pull": spread(extra) for pull, extra in added.items()},
            "first update": first,
            "update": spread(update),
            "update that chooses widths": chosen[0],
            "update that keeps them": chosen[1],
        },
        "share of an epoch": {
            pull: (statistics.median(extra) * batches + max(*update, chosen[0])) / epoch
            for pull, extra in added.items()
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
