"""Clustering all layers of a full-width VGG-16 at k = half: Filterfold against scikit-learn's KMeans.

Both get the same float32 directions, two threads and one start; runs alternate, so that a busy machine slows both.
Two sets of rows: fresh (random directions, the hardest: nothing clusters) and bundled (noisy copies of half as many
directions, as a pull during training leaves them). Writes medians, spread and inertia to results/clustering_speed.json.

    python benchmarks/clustering_speed.py [--rounds 5] [--threads 2] [--output results/clustering_speed.json]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

SHAPES = [
    (64, 27),
    (64, 576),
    (128, 576),
    (128, 1152),
    (256, 1152),
    *[(256, 2304)] * 2,
    (512, 2304),
    *[(512, 4608)] * 5,
]


def main() -> None:
    """Run both kinds of rows and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="divide the number of filters by this, for a quick try")
    parser.add_argument("--output", type=Path, default=Path("results/clustering_speed.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before scikit-learn and torch are imported
    report = {"what": "seconds for all 13 layers of VGG-16, k = half", "environment": environment(options.threads)}
    for name in ("fresh", "bundled"):
        report[name] = compare(rows(name, options.scale), options.rounds)
        print(name, report[name])
    from filterfold.utils.io import write_json

    write_json(options.output, report)
    print("written:", options.output)


def rows(kind: str, scale: int):
    """The directions of every layer's filters."""
    import torch

    from filterfold.online.clustering import directions

    generator = torch.Generator().manual_seed(0)
    layers = []
    for filters, length in SHAPES:
        n = filters // scale
        x = torch.randn(n, length, generator=generator)
        if kind == "bundled":
            x = 0.3 * x + torch.randn(n // 2, length, generator=generator).repeat(2, 1)
        layers.append(directions(x))
    return layers


def compare(layers, rounds: int) -> dict:
    """Seconds, inertia and speed-up over interleaved rounds."""
    from sklearn.cluster import KMeans

    from filterfold.online.clustering import cluster

    seconds: dict[str, list[float]] = {"filterfold": [], "scikit-learn": []}
    inertia: dict[str, list[float]] = {"filterfold": [], "scikit-learn": []}
    for index in range(-1, rounds):  # the first round warms both up and is thrown away
        runs = {
            "filterfold": lambda x, s=index: cluster(x, clusters=len(x) // 2, restarts=1, seed=s + 1).inertia,
            "scikit-learn": lambda x, s=index: (
                KMeans(len(x) // 2, n_init=1, random_state=s + 1).fit(x.numpy()).inertia_
            ),
        }
        for name in sorted(runs, reverse=bool(index % 2)):
            begin = time.perf_counter()
            total = sum(float(runs[name](x)) for x in layers)
            if index >= 0:
                seconds[name].append(time.perf_counter() - begin)
                inertia[name].append(total)
    ratios = [theirs / ours for ours, theirs in zip(seconds["filterfold"], seconds["scikit-learn"], strict=True)]
    return {
        "rounds": rounds,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "inertia": {name: summary(values) for name, values in inertia.items()},
        "speedup": summary(ratios),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment(threads: int) -> dict:
    """Set the threads, say what it ran on."""
    import sklearn
    import torch

    torch.set_num_threads(threads)
    return {
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
