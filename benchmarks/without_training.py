"""Without training after the cut: dropping and folding, batch norms measured anew, kernels repaired; top-1 of each.

ResNet-56 of SHARED/weights on CIFAR-10. For every share of filters kept in every layer: L1 dropping as it is, with
batch norms measured anew, and with repair; folding with both. Calibration on training images without augmentation.
Writes results/without_training.json.

    python benchmarks/without_training.py SHARED [--shares 0.9,0.7,0.5,0.3] [--images 10000] [--calibration 1000]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold import data, zoo
from filterfold.experiment.environment import command, describe
from filterfold.online import OnlineFilterClustering
from filterfold.plan import Plan
from filterfold.reconstruction import reestimate, repair
from filterfold.storage import read_safetensors, write_json

Measure = Callable[[nn.Module], float]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--shares", default="0.9,0.7,0.5,0.3")
    parser.add_argument("--images", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--calibration", type=int, default=1000, help="training images to repair on")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of k-means and of the calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/without_training.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = describe()  # now: the checkout may move on while this runs
    model = zoo.build("resnet56")
    model.load_state_dict(read_safetensors(options.shared / "weights" / "resnet56-cifar10.safetensors")[1])
    images = data.load(str(options.shared / "data" / "cifar10"), normalization="imagenet")
    order = data.batches(images.train, options.batch, shuffle=True, seed=options.seed)
    calibration = [batch for batch, _ in zip(order, range(options.calibration // options.batch), strict=False)]
    rows = compare(model, images.test, calibration, options)
    report = {
        "what": "top-1 of ResNet-56 after cutting every layer to a share of its filters, no training after the cut",
        "command": command(),
        "test_images": min(options.images, len(images.test)),
        "calibration_images": sum(len(batch[0]) for batch in calibration),
        "ridge": options.ridge,
        "seed": options.seed,
        "rows": rows,
        "environment": environment,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    print("written:", options.out)


def compare(model: nn.Module, test: Any, calibration: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Top-1 of the dense network, and of every way to cut it at every share."""
    model = model.eval()

    def top1(network: nn.Module) -> float:
        right = seen = 0
        with torch.inference_mode():
            for inputs, labels in data.batches(test, options.batch):
                inputs, labels = inputs[: options.images - seen], labels[: options.images - seen]
                right += int((network.eval()(inputs).argmax(1) == labels).sum())
                seen += len(labels)
                if seen >= options.images:
                    break
        return 100 * right / seen

    rows: list[dict[str, Any]] = [{"method": "dense", "keep": 1.0, "top1": top1(model)}]
    print(rows[-1], flush=True)
    for share in map(float, options.shares.split(",")):
        for method, cut in (("l1", drop), ("fold", fold)):
            for remedy in ("none", "batch norm", "repair"):
                if (method, remedy) == ("fold", "none"):
                    continue
                rows.append(
                    {
                        "method": method,
                        "remedy": remedy,
                        "keep": share,
                        **one(model, cut, remedy, share, calibration, top1, options),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def one(
    model: nn.Module,
    cut: Callable[..., Plan],
    remedy: str,
    share: float,
    calibration: list[Any],
    top1: Measure,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Cut a copy, apply the remedy, measure."""
    network = copy.deepcopy(model)
    example = calibration[0][0][:1]
    before = ff.measure(network, example).macs
    plan = cut(network, example, share, options.seed)
    started = time.perf_counter()
    if remedy == "batch norm":
        reestimate(network, calibration, batches=len(calibration))
    errors = {}
    if remedy == "repair":
        found = repair(network, model, plan, calibration, batches=len(calibration), ridge=options.ridge)
        errors = {
            "mean_layer_error": [
                sum(row.before for row in found.layers) / len(found.layers),
                sum(row.after for row in found.layers) / len(found.layers),
            ]
        }
    seconds = time.perf_counter() - started
    macs = ff.measure(network, example).macs / before
    return {"macs": macs, "top1": top1(network), "remedy_seconds": seconds, **errors}


def drop(network: nn.Module, example: Tensor, share: float, seed: int) -> Plan:
    """Drop the filters of smallest L1 norm in every group."""
    return ff.prune(network, example, keep=share, verify=False, seed=seed).plan


def fold(network: nn.Module, example: Tensor, share: float, seed: int) -> Plan:
    """Fold clusters of filters in every group."""
    online = OnlineFilterClustering(network, example, keep=share, verify=False, seed=seed)
    return online.cluster_and_prune().plan


if __name__ == "__main__":
    main()
