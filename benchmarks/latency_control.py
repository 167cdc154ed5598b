"""The A/A control: quarter-width VGG-16 against itself at batch 64, on this machine's CPU.

The bar: 1.00x within 3 %. The control is the very same network, timed in turn with itself; every trial makes a
measurement of its own with the library's defaults and gives the median over its rounds of time / time. A second,
separately built network with the same weights is timed beside it: what differs between two copies (where their
tensors lie in memory) is not noise and is reported apart. Load average before and after; wall time. Writes every
trial to results/latency_control.json.

    python benchmarks/latency_control.py [--trials 10] [--repeats 20] [--threads 1] [--width 0.25] [--batch 64]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from pathlib import Path
from typing import Any

BAR = 0.03


def main() -> None:
    """Run the trials and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--output", type=Path, default=Path("results/latency_control.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import torch

    from filterfold.utils.environment import describe
    from filterfold.utils.io import write_json
    from filterfold.zoo import build

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build("vgg16", width=options.width)
    report: dict[str, Any] = {
        "network": f"vgg16, width {options.width}",
        "batch_size": options.batch,
        "mode": options.mode,
        "repeats_per_trial": options.repeats,
        "bar": BAR,
        "load_average_before": os.getloadavg(),
    }
    trials = [trial(model, options) for _ in range(options.trials)]
    report |= {"control": summary([t["control"] for t in trials]), "copy": summary([t["copy"] for t in trials])}
    report |= {"trials": trials, "load_average_after": os.getloadavg(), "environment": describe()}
    for key, value in report.items():
        if key != "trials":
            print(key, value)
    write_json(options.output, report)
    print("written:", options.output)


def trial(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: the control's and the copy's speed-up with intervals, and milliseconds per call."""
    import torch

    from filterfold.profiling import CONTROL, measure_latency

    models = {"network": model, "copy": copy.deepcopy(model)}
    found = measure_latency(
        models, torch.zeros(1, 3, 32, 32), batch_sizes=[options.batch], repeats=options.repeats, mode=options.mode
    )
    return {
        "control": found.speedup(CONTROL, options.batch),
        "control_interval": found.speedup_interval(CONTROL, options.batch),
        "copy": found.speedup("copy", options.batch),
        "milliseconds": 1e3 * found.row("network", options.batch).median,
        "load": found.conditions["load"],
    }


def summary(ratios: list[float]) -> dict[str, Any]:
    """Number, median, extremes, spread, and how many lie within the bar."""
    return {
        "n": len(ratios),
        "median": round(statistics.median(ratios), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "sd": round(statistics.stdev(ratios), 4) if len(ratios) > 1 else None,
        "within_bar": sum(abs(ratio - 1) <= BAR for ratio in ratios),
    }


if __name__ == "__main__":
    main()
