"""How fast VGG-16 trains on 32 × 32 images, and how far that is from what the arithmetic alone would take.

Images per second of whole training epochs (augmentation, forward, backward, SGD) on random images that live on the
device; full and quarter width, before and after half of every layer is cut, in several modes. All modes run in turn,
round by round, and in every round the machine's own speed is measured with large products and convolutions in the same
precision. The *share of the floor* is (6 × MACs × images per second) / that speed: a multiply-accumulate is two
operations, and training does it three times (forward, gradient by inputs, gradient by weights). The cut happens inside
the run, so compiled networks are compiled again.

On the GPU if there is one; on a CPU at a reduced size, and there in processor time (of all threads, divided by their
number), which other work on the machine changes less than wall time; the load average is noted. Writes
results/training_speed.json.

    python benchmarks/training_speed.py [--device cuda] [--widths 1,0.25] [--steps 100] [--rounds 5] [--batch 128]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
IMAGES = 50_000
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16-mixed"},
    "bf16 channels_last": {"precision": "bf16-mixed", "channels_last": True},
    "bf16 compile": {"precision": "bf16-mixed", "compile": True},
    "channels_last compile": {"channels_last": True, "compile": True},
    "bf16 channels_last compile": {"precision": "bf16-mixed", "channels_last": True, "compile": True},
    "bf16 channels_last graphs": {"precision": "bf16-mixed", "channels_last": True, "cuda_graphs": True},
    "bf16 channels_last compile graphs": {
        "precision": "bf16-mixed",
        "channels_last": True,
        "compile": True,
        "cuda_graphs": True,
    },
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--widths", default="1,0.25")
    parser.add_argument("--modes", help=f"comma-separated, of: {', '.join(MODES)}; default: all that the device has")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="of an epoch; 100 on a GPU; on a CPU 1, more for small widths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, default=Path("results/training_speed.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import torch

    from filterfold.utils.environment import command, describe
    from filterfold.utils.io import write_json

    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = options.modes.split(",") if options.modes else [name for name in MODES if fits(name, device)]
    report: dict[str, Any] = {
        "what": "VGG-16 for CIFAR-10, training with SGD and crop-flip on random images",
        "batch": options.batch,
        "rounds": options.rounds,
        "seed": SEED,
        "clock": "processor time" if device == "cpu" else "wall time",
        "load_average_before": os.getloadavg(),
        "environment": describe(device),
        "command": command(),
        "results": [],
    }
    for width in map(float, options.widths.split(",")):
        steps = options.steps or (100 if device != "cpu" else max(1, round(0.5 / width**2)))
        for row in measure(width, chosen, device, options.batch, steps, options.rounds):
            report["results"].append(row)
            print(line(row), flush=True)
        report["load_average_after"] = os.getloadavg()
        write_json(options.output, report)
    print("written:", options.output)


def fits(mode: str, device: str) -> bool:
    """Whether a mode is for this device."""
    return device != "cpu" or not MODES[mode].get("cuda_graphs")


@dataclass
class Runner:
    """One mode's training run."""

    mode: str
    run: Any
    loop: Any
    images: int
    device: str

    def speed(self) -> float:
        """Images per second of one epoch."""
        self.run.epoch += 1
        return self.images / seconds(self.loop.epoch, self.device)

    def cut(self) -> float:
        """Cut half of every layer; seconds, with those of the first epoch after it (compilation)."""
        from filterfold import prune

        begin = time.perf_counter()
        prune(self.run.model, self.run.example, keep=0.5, optimizer=self.run.optimizer, verify=False)
        self.run.structure_changed()
        self.speed()
        return time.perf_counter() - begin


def start(mode: str, width: float, device: str, batch: int, steps: int) -> Runner:
    """A run of `training.train`, in pieces: the benchmark decides when an epoch is trained."""
    import torch

    from filterfold.data import ImageData, Split
    from filterfold.training import Recipe, Run, fabric
    from filterfold.training.loop import Job, Leading, Loop
    from filterfold.zoo import build

    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(0, 256, (batch * steps, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (batch * steps,), generator=generator)
    split = Split(pixels, labels, ((0.5,) * 3, (0.25,) * 3))
    nothing = split.take(torch.arange(0))
    data = ImageData("random", tuple("0123456789"), 3, 32, split, nothing, nothing, "crop-flip")
    torch.manual_seed(SEED)
    recipe = Recipe(epochs=1000, batch_size=batch, schedule="constant", lr=0.01, seed=SEED, **MODES[mode])
    model = build("vgg16", width=width).train()
    fabric = fabric.make(device, recipe, model, data.example)
    model.to(fabric.device)
    run = Run(model, recipe.make_optimizer(model), data, recipe, fabric, "train")
    job = Job(model, data, recipe, callbacks=(), optimizer=None, validate_every=0, device=device, phase="train")
    return Runner(mode, run, Loop(run, job, Leading(), {}), batch * steps, device)


def measure(width: float, modes: list[str], device: str, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """All modes in turn, before and after the cut."""
    runners, first = [], {}
    for mode in modes:
        begin = time.perf_counter()
        runners.append(start(mode, width, device, batch, steps))
        runners[-1].speed()
        first[mode] = time.perf_counter() - begin
    rows = []
    for state in ("dense", "half cut"):
        if state == "half cut":
            first = {runner.mode: runner.cut() for runner in runners}
            for runner in runners:  # a cut makes PyTorch forget what is compiled, also of the other runs
                runner.speed()
        speeds: dict[str, list[float]] = {mode: [] for mode in modes}
        shares: dict[str, list[float]] = {mode: [] for mode in modes}
        floors: dict[str, list[float]] = {}
        for turn in range(rounds):
            own = {precision: floor(device, precision) for precision in sorted({precision_of(mode) for mode in modes})}
            for precision, value in own.items():
                floors.setdefault(precision, []).append(value)
            for runner in runners if turn % 2 == 0 else runners[::-1]:
                speed = runner.speed()
                speeds[runner.mode].append(speed)
                shares[runner.mode].append(6 * runner.run.macs * speed / own[precision_of(runner.mode)])
        rows += [
            {
                "width": width,
                "steps": steps,
                "state": state,
                "mode": runner.mode,
                "macs": runner.run.macs,
                "images_per_second": spread(speeds[runner.mode]),
                "share_of_floor": spread(shares[runner.mode]),
                "operations_per_second": spread(floors[precision_of(runner.mode)]),
                "seconds_to_start": first[runner.mode],
                "seconds_for_100_epochs": 100 * IMAGES / statistics.median(speeds[runner.mode]),
            }
            for runner in runners
        ]
    return rows


def precision_of(mode: str) -> str:
    """The precision that a mode computes in."""
    return str(MODES[mode].get("precision", "32-true"))


def floor(device: str, precision: str) -> float:
    """Operations per second: the best of large products and convolutions, in either memory format."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    size, count, channels = (1024, 16, 128) if device == "cpu" else (8192, 512, 256)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    images = torch.randn(count, channels, 32, 32, device=device).to(dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    last = torch.channels_last
    images_last, kernel_last = images.contiguous(memory_format=last), kernel.contiguous(memory_format=last)
    convolve = torch.nn.functional.conv2d
    work: list[tuple[float, Callable[[], object]]] = [
        (2.0 * size**3, lambda: left @ right),
        (2.0 * count * 1024 * 9 * channels**2, lambda: convolve(images, kernel, padding=1)),
        (2.0 * count * 1024 * 9 * channels**2, lambda: convolve(images_last, kernel_last, padding=1)),
    ]
    with torch.no_grad():
        return max(operations / min(seconds(run, device) for _ in range(4)) for operations, run in work)


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call: processor time on a CPU, wall time on a GPU."""
    import torch

    if device == "cpu":
        begin = time.process_time()
        run()
        return (time.process_time() - begin) / torch.get_num_threads()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def spread(values: list[float]) -> dict[str, float]:
    """Median, range and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    speed, share = row["images_per_second"], row["share_of_floor"]
    return (
        f"width {row['width']:<5g} {row['state']:<9} {row['mode']:<34} {speed['median']:>9.0f} images/s "
        f"({speed['min']:.0f} to {speed['max']:.0f}), {share['median']:>4.0%} of the floor, "
        f"start {row['seconds_to_start']:.1f} s, 100 epochs {row['seconds_for_100_epochs']:.0f} s"
    )


if __name__ == "__main__":
    main()
