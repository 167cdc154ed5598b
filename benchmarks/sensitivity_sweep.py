"""The sensitivity sweep of ResNet-56: 27 first convolutions x 9 ratios on 2,000 validation images, 2 threads.

    python benchmarks/sensitivity_sweep.py SHARED [--criteria l1,random,largest] [--out results/...]

SHARED holds `weights/` and `data/cifar10`. Says how long it took, and whether the findings of Li et al. (2017)
hold: layers 20, 38 and 54 the most sensitive; smallest before random before largest at 50 %.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from filterfold import data, graph, zoo
from filterfold.bench.report.sensitivity import write
from filterfold.bench.sensitivity import RATIOS, sweep
from filterfold.utils.environment import describe
from filterfold.utils.io import read_safetensors


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--criteria", default="l1")
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("results/sensitivity_resnet56"), help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = zoo.build("resnet56")
    model.load_state_dict(read_safetensors(options.shared / "weights" / "resnet56-cifar10.safetensors")[1])
    images = data.load(str(options.shared / "data" / "cifar10"), normalization="imagenet", validation=5000)
    part = options.out / "sensitivity.part"
    found = sweep(
        model,
        graph.trace(model, images.example),
        getattr(images, options.split),
        criteria=options.criteria.split(","),
        ratios=[float(ratio) for ratio in options.ratios.split(",")],
        layers=["layer*.conv1"],
        images=options.images,
        path=part,
    )
    conditions = {
        "model": "resnet56",
        "weights": "resnet56-cifar10.safetensors",
        "data": f"cifar10, {options.split} split, {found.images} images",
        "normalization": "imagenet",
        **{key: value for key, value in describe("cpu").items() if key != "packages"},
        "load_average": os.getloadavg(),
    }
    write(replace(found, conditions=conditions), options.out)
    part.unlink()
    print(f"base {found.base['top1']:.2f} %, {found.seconds:.0f} s on the clock, {found.cpu_seconds:.0f} s of CPU")
    for criterion in found.criteria:
        if 0.5 in found.ratios:
            print(criterion, "mean at 50 %:", f"{found.mean(criterion, 0.5):.2f}")
        most = max(found.ratios)
        names = [f"{name} {top1:.1f}" for name, top1 in found.ranked(criterion, most)[:6]]
        print(f"  lowest at {most:.0%}:", ", ".join(names))


if __name__ == "__main__":
    main()
