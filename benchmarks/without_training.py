"""Without training after the cut: dropping and folding, batch norms measured anew, kernels repaired; top-1 of each.

For every share of filters kept in every layer, of a trained network on CIFAR-10's test set: L1 dropping as it is, with
batch norms measured anew, and with repair; folding with the last two. Calibration on training images without
augmentation, drawn anew for each seed.

    python benchmarks/without_training.py SHARED                # ResNet-56 of SHARED/weights
    python benchmarks/without_training.py SHARED --model vgg16 --width 0.25 --weights dense.safetensors …
                                          [--shares 0.9,0.7,0.5,0.3] [--images 10000] [--calibration 1000] [--seeds 0]

Writes results/without_training_MODEL.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
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
from filterfold.storage import write_json

Measure = Callable[[nn.Module], float]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--weights", type=Path, nargs="+", help="trained networks; default: those of SHARED/weights")
    parser.add_argument("--shares", default="0.9,0.7,0.5,0.3")
    parser.add_argument("--images", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--calibration", type=int, default=1000, help="training images to repair on")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--seeds", default="0", help="of k-means and of the calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = describe()  # now: the checkout may move on while this runs
    out = options.out or Path(f"results/without_training_{options.model}.json")
    given = options.weights or [options.shared / "weights" / f"{options.model}-cifar10.safetensors"]
    normalization = "dataset" if options.weights else "imagenet"  # that of SHARED/weights
    images = data.load(str(options.shared / "data" / "cifar10"), normalization=normalization)
    rows = []
    for weights in given:
        model = zoo.build(options.model, width=options.width)
        ff.load_weights(model, weights)
        for seed in map(int, options.seeds.split(",")):
            order = data.batches(images.train, options.batch, shuffle=True, seed=seed)
            calibration = [batch for batch, _ in zip(order, range(options.calibration // options.batch), strict=False)]
            for row in compare(model, images.test, calibration, seed, options):
                rows.append({"weights": weights.name, "seed": seed} | row)
                print(rows[-1], flush=True)
    report = {
        "what": "top-1 after cutting every layer to a share of its filters, no training after the cut",
        "model": options.model,
        "width": options.width,
        "command": command(),
        "test_images": min(options.images, len(images.test)),
        "calibration_images": options.calibration // options.batch * options.batch,
        "ridge": options.ridge,
        "rows": rows,
        "environment": environment,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    print("written:", out)


def compare(
    model: nn.Module, test: Any, calibration: list[Any], seed: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
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

    yield {"method": "dense", "keep": 1.0, "top1": top1(model)}
    for share in map(float, options.shares.split(",")):
        for method, cut in (("l1", drop), ("fold", fold)):
            for remedy in ("none", "batch norm", "repair"):
                if (method, remedy) == ("fold", "none"):
                    continue
                found = one(model, cut, remedy, share, calibration, top1, seed, options)
                yield {"method": method, "remedy": remedy, "keep": share, **found}


def one(
    model: nn.Module,
    cut: Callable[..., Plan],
    remedy: str,
    share: float,
    calibration: list[Any],
    top1: Measure,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Cut a copy, apply the remedy, measure."""
    network = copy.deepcopy(model)
    example = calibration[0][0][:1]
    before = ff.measure(network, example).macs
    plan = cut(network, example, share, seed)
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
    online = OnlineFilterClustering(network, example, keep=share, round_to=1, verify=False, seed=seed)
    return online.cluster_and_prune().plan


if __name__ == "__main__":
    main()
