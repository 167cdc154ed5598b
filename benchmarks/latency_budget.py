"""Asked, predicted, measured: VGG-16 cut to shares of its time on this machine's CPU.

For each share a network with random weights is pruned by `latency=share` and then timed again by a measurement of its
own, with more rounds than the budget's. Beside it stand the shares of MACs, and a network pruned uniformly to the
same MACs: what choosing widths by measured time gains over choosing them by arithmetic. Load average before and after.
Writes results/latency_budget.json.

    python benchmarks/latency_budget.py [--shares 0.5 0.25 0.125] [--width 1] [--batch 16] [--threads 1] [--repeats 30]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("results/latency_budget.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import torch

    from filterfold.utils.environment import describe
    from filterfold.utils.io import write_json
    from filterfold.zoo import build

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build(options.model, width=options.width)
    report: dict[str, Any] = {
        "network": f"{options.model}, width {options.width:g}, random weights",
        "batch_size": options.batch,
        "repeats": options.repeats,
        "load_average_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as folder:
        report["shares"] = [one(model, share, options, folder) for share in options.shares]
    report |= {"load_average_after": os.getloadavg(), "environment": describe()}
    for key, value in report.items():
        print(key, value)
    write_json(options.output, report)
    print("written:", options.output)


def one(model: Any, share: float, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Prune to a share, and time what came out once more, beside a uniform cut of the same MACs."""
    import torch

    from filterfold import LatencyBudget, measure_latency, prune

    example = torch.zeros(1, 3, 32, 32)
    cut, uniform = copy.deepcopy(model), copy.deepcopy(model)
    start = time.perf_counter()
    result = prune(cut, example, latency=LatencyBudget(share, batch_size=options.batch, folder=folder))
    seconds = time.perf_counter() - start
    macs = result.after.macs / result.before.macs
    prune(uniform, example, macs=macs, verify=False)
    found = measure_latency(
        {"dense": model, "cut": cut, "uniform": uniform}, example, batch_sizes=[options.batch], repeats=options.repeats
    )
    notes = result.plan.notes["latency"]
    return {
        "asked": share,
        "predicted": notes["predicted"],
        "measured": notes["measured"],
        "measured_again": 1 / found.speedup("cut", options.batch),
        "interval": [1 / end for end in reversed(found.speedup_interval("cut", options.batch))],
        "control": found.speedup("A/A control", options.batch),
        "macs": macs,
        "uniform_same_macs": 1 / found.speedup("uniform", options.batch),
        "networks_measured": len(notes["tries"]),
        "seconds": seconds,
        "widths": {name: after for name, (_, after) in result.plan.widths.items()},
    }


if __name__ == "__main__":
    main()
