"""Without training after the cut: dropping and folding, batch norms measured anew, kernels repaired; top-1 of each.

For every share of filters kept in every layer, of a trained network on CIFAR-10's test set: L1 dropping as it is, with
batch norms measured anew, and with repair; folding and dropping by reconstruction error with the last two. Then these
two with as many multiply-accumulates, but widths for each layer (`budget`): from how well it clusters, or from the
errors. Calibration on training images without augmentation, drawn anew for each seed.

    python benchmarks/without_training.py SHARED                # ResNet-56 of SHARED/weights
    python benchmarks/without_training.py SHARED --model vgg16 --width 0.25 --weights dense.safetensors …
                                          [--shares 0.9,0.7,0.5,0.3] [--images 10000] [--calibration 1000] [--seeds 0]

Writes results/without_training_MODEL.json, row by row; what stands there for the same options is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold import data, zoo
from filterfold.online import CutOptions, OnlineFilterClustering
from filterfold.plan import Plan
from filterfold.pruning.reconstruction import reestimate, repair
from filterfold.utils.environment import command, describe
from filterfold.utils.io import write_json

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
    parser.add_argument("--ridge", type=float, help="the same for every layer; by default chosen for each")
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
    settings = {
        "model": options.model,
        "width": options.width,
        "test_images": min(options.images, len(images.test)),
        "calibration_images": options.calibration // options.batch * options.batch,
        "ridge": options.ridge,
    }
    done = Rows(out, settings, environment)
    for weights in given:
        model = zoo.build(options.model, width=options.width)
        ff.load_weights(model, weights)
        for seed in map(int, options.seeds.split(",")):
            order = data.batches(images.train, options.batch, shuffle=True, seed=seed)
            calibration = [batch for batch, _ in zip(order, range(options.calibration // options.batch), strict=False)]
            compare(model, images.test, calibration, {"weights": weights.name, "seed": seed}, options, done)
    print("written:", out)


class Rows:
    """The rows of the report: those that are there already, and new ones, written down at once.

    Each names the run that it is of, by its place in `runs`.
    """

    def __init__(self, path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        found = json.loads(path.read_text()) if path.exists() else {}
        if any(found.get(name, value) != value for name, value in settings.items()):
            raise SystemExit(f"{path} is of other options; give another --out")
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = found.get("rows", [])
        self.runs = [*found.get("runs", []), {"command": command(), "environment": environment}]

    def add(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, if it is not there."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return
        self.rows.append(key | measured() | {"run": len(self.runs) - 1})
        print(self.rows[-1], flush=True)
        what = "top-1 after cutting a trained network, no training after the cut"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"what": what, **self.settings, "rows": self.rows, "runs": self.runs})


def compare(
    model: nn.Module,
    test: Any,
    calibration: list[Any],
    key: dict[str, Any],
    options: argparse.Namespace,
    done: Rows,
) -> None:
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

    done.add({**key, "method": "dense", "keep": 1.0}, lambda: {"top1": top1(model)})
    example = calibration[0][0][:1]
    seed = key["seed"]
    for share in map(float, options.shares.split(",")):
        for method, remedies in WAYS.items():
            for remedy in remedies:

                def measured(share: float = share, method: str = method, remedy: str = remedy) -> dict[str, Any]:
                    network = copy.deepcopy(model)
                    plan = CUTS[method](network, example, share, seed, calibration)
                    return one(network, model, plan, remedy, calibration, top1, options)

                done.add({**key, "method": method, "remedy": remedy, "keep": share}, measured)


def one(
    network: nn.Module,
    model: nn.Module,
    plan: Plan,
    remedy: str,
    calibration: list[Any],
    top1: Measure,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Apply the remedy to the cut network, measure."""
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
    example = calibration[0][0][:1]
    macs = ff.measure(network, example).macs / ff.measure(model, example).macs
    return {"macs": macs, "top1": top1(network), "remedy_seconds": seconds, **errors}


def drop(network: nn.Module, example: Tensor, share: float, seed: int, _calibration: list[Any]) -> Plan:
    """Drop the filters of smallest L1 norm in every group."""
    return ff.prune(network, example, keep=share, verify=False, scoring=ff.Scoring(seed=seed)).plan


def fold(network: nn.Module, example: Tensor, share: float, seed: int, _calibration: list[Any]) -> Plan:
    """Fold clusters of filters in every group."""
    return folded(network, example, seed, keep=share)


def fold_to_budget(network: nn.Module, example: Tensor, share: float, seed: int, _calibration: list[Any]) -> Plan:
    """Fold clusters, with widths from how well each group clusters, to the cost of the uniform cut."""
    return folded(network, example, seed, macs=uniform_cost(network, example, share))


def folded(network: nn.Module, example: Tensor, seed: int, **budget: Any) -> Plan:
    """Fold clusters of filters within a budget."""
    online = OnlineFilterClustering(network, example, round_to=1, cutting=CutOptions(seed=seed, verify=False), **budget)
    return online.cluster_and_prune().plan


def lose_least(network: nn.Module, example: Tensor, share: float, seed: int, calibration: list[Any]) -> Plan:
    """Drop the filters that the next layers can best do without, in every group."""
    options: dict[str, Any] = {"criterion": "reconstruction", "loader": calibration, "verify": False}
    return ff.prune(network, example, keep=share, scoring=ff.Scoring(seed=seed), **options).plan


def lose_least_to_budget(network: nn.Module, example: Tensor, share: float, seed: int, calibration: list[Any]) -> Plan:
    """Drop those filters of all groups together, to the cost of the uniform cut."""
    options: dict[str, Any] = {
        "criterion": "reconstruction",
        "loader": calibration,
        "verify": False,
        "scoring": ff.Scoring(seed=seed),
        "selection": ff.Selection(scope="global"),
    }
    return ff.prune(network, example, macs=uniform_cost(network, example, share), **options).plan


def uniform_cost(network: nn.Module, example: Tensor, share: float) -> float:
    """Share of the multiply-accumulates that is left when every group keeps the same share of its filters."""
    plain = copy.deepcopy(network)
    ff.prune(plain, example, keep=share, verify=False)
    return ff.measure(plain, example).macs / ff.measure(network, example).macs


CUTS: dict[str, Callable[..., Plan]] = {
    "l1": drop,
    "fold": fold,
    "reconstruction": lose_least,
    "fold, budget": fold_to_budget,
    "reconstruction, budget": lose_least_to_budget,
}
WAYS = {
    "l1": ("none", "batch norm", "repair"),
    "fold": ("batch norm", "repair"),
    "reconstruction": ("batch norm", "repair"),
    "fold, budget": ("repair",),
    "reconstruction, budget": ("repair",),
}
"""Method → what is done after the cut."""


if __name__ == "__main__":
    main()
