"""Without training after the cut: dropping and folding; as it is, batch norms measured anew, kernels repaired.

ResNet-20/32/44/56 on CIFAR-10's test set, calibrated on training images without augmentation; EfficientNet-Lite0 on one
half of a sample of ImageNet photos, calibrated on images of the other. Each at several shares of the uncut network's
multiply-accumulates: L1 with uniform widths, folding with widths from how well each layer clusters, `reconstruction`
ranked over all layers. Besides top-1, how often the small network says what the uncut one says (agreement).

    python benchmarks/without_training.py SHARED --models lite0 --calibration 256 --batch 64
    python benchmarks/without_training.py SHARED --models resnet20,resnet32,resnet44,resnet56
    python benchmarks/without_training.py SHARED --models vgg16 --width 0.25 --weights dense.safetensors …
                         [--shares 0.9,0.7,0.5,0.3 instead of --macs 0.9,0.8,0.7,0.6]: of the filters of every layer
                         [--methods l1,fold,reconstruction] [--images 10000] [--calibration 1000] [--seeds 0]

Writes results/without_training.json, a record for each row, row by row; what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from conformance.torchvision_shim import declare_missing_operators
from torch import Tensor, nn

import filterfold as ff
from filterfold import data, zoo
from filterfold.online import CutOptions, OnlineFilterClustering
from filterfold.plan import Plan
from filterfold.pruning.budgets import Budget
from filterfold.pruning.scored import Rules, Scored, scored
from filterfold.utils.environment import command, describe
from filterfold.utils.io import write_json

REMEDIES = ("none", "batch norm", "repair")
LITE0 = "tf_efficientnet_lite0"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", default="resnet56", help="of the zoo, or lite0")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--weights", type=Path, nargs="+", help="trained networks; default: those of SHARED/weights")
    parser.add_argument("--macs", default="0.9,0.8,0.7,0.6")
    parser.add_argument("--shares", help="of the filters of every layer, instead of --macs")
    parser.add_argument("--methods", default="l1,fold,reconstruction")
    parser.add_argument("--images", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--calibration", type=int, default=1000, help="images to score and to repair on")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seeds", default="0", help="of k-means and of the calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/without_training.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = Records(options.out)
    for name in options.models.split(","):
        for weights in options.weights or [None]:
            for seed in map(int, options.seeds.split(",")):
                compare(case(name, weights, seed, options), records, options)
    print("written:", options.out)


@dataclass(frozen=True)
class Case:
    """A trained network, batches to score and repair on, and batches with labels to test on.

    `key` is what all its records say.
    """

    key: dict[str, Any]
    model: nn.Module
    calibration: list[Tensor]
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.calibration[0][:1]

    @torch.inference_mode()
    def answers(self, network: nn.Module) -> Tensor:
        """The class that a network gives each test image."""
        return torch.cat([network.eval()(inputs).argmax(1) for inputs, _ in self.test()])

    @property
    def labels(self) -> Tensor:
        """Those of the test images."""
        return torch.cat([labels for _, labels in self.test()])


def case(name: str, weights: Path | None, seed: int, options: argparse.Namespace) -> Case:
    """A network and its images."""
    if name == "lite0":
        return lite0(seed, options)
    file = weights or options.shared / "weights" / f"{name}-cifar10.safetensors"
    model = zoo.build(name, width=options.width)
    ff.load_weights(model, file)
    normalization = "dataset" if weights else "imagenet"  # that of SHARED/weights
    images = data.load(str(options.shared / "data" / "cifar10"), normalization=normalization)
    order = data.batches(images.train, options.batch, shuffle=True, seed=seed)
    calibration = [inputs for inputs, _ in islice(order, options.calibration // options.batch)]
    count = min(options.images, len(images.test))

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for inputs, labels in data.batches(images.test, options.batch):
            yield inputs[: count - seen], labels[: count - seen]
            seen += len(inputs)
            if seen >= count:
                return

    key = {"model": name, "width": options.width, "weights": file.name, "seed": seed, "test_images": count}
    return Case({**key, "calibration_images": sum(map(len, calibration))}, model.eval(), calibration, test)


def lite0(seed: int, options: argparse.Namespace) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights, at 224 pixels, on photos as it was trained on."""
    declare_missing_operators()
    model = zoo.build(f"timm:{LITE0}", classes=1000)
    file = options.shared / "weights" / f"{LITE0}-imagenet.safetensors"
    ff.load_weights(model, file)
    inputs, labels = photos(options.shared / "data" / "imagenet-sample", 224)
    order = torch.randperm(len(inputs) // 2, generator=torch.Generator().manual_seed(seed))[: options.calibration]
    calibration = [normalised(inputs[part]) for part in order.split(options.batch)]
    rest = range(len(inputs) // 2, min(len(inputs), len(inputs) // 2 + options.images))

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.tensor(rest).split(options.batch):
            yield normalised(inputs[part]), labels[part]

    key = {"model": "lite0", "weights": file.name, "seed": seed, "test_images": len(rest)}
    return Case({**key, "calibration_images": len(order)}, model.eval(), calibration, test)


@cache
def photos(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """The middle of every photo, of bytes, and the labels."""
    import io

    import numpy as np
    import pyarrow.parquet
    from PIL import Image

    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]
    found = []
    for row in rows:
        encoded = next(value for name, value in row.items() if name != "label")["bytes"]
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        left, top = (image.width - size) // 2, (image.height - size) // 2
        found.append(torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))))
    return torch.stack(found).permute(0, 3, 1, 2).contiguous(), torch.tensor([row["label"] for row in rows])


def normalised(images: Tensor) -> Tensor:
    """As the weights were trained."""
    return (images.float() - 127) / 128


class Records:
    """The records of the report: those that are there already, and new ones, written down at once.

    Each names the run that it is of, by its place in `runs`.
    """

    def __init__(self, path: Path) -> None:
        found = json.loads(path.read_text()) if path.exists() else {}
        self.path = path
        self.rows: list[dict[str, Any]] = found.get("rows", [])
        self.runs = [*found.get("runs", []), {"command": command(), "environment": describe()}]

    def add(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, if it is not there."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return
        self.rows.append(key | measured() | {"run": len(self.runs) - 1})
        print(self.rows[-1], flush=True)
        what = "top-1 and agreement with the uncut network after cutting a trained network, no training after the cut"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"what": what, "rows": self.rows, "runs": self.runs})


def compare(case: Case, records: Records, options: argparse.Namespace) -> None:
    """Every way to cut a network, at every budget, with every remedy."""
    uncut = cache(lambda: case.answers(case.model))
    labels = cache(lambda: case.labels)
    macs = ff.measure(case.model, case.example).macs
    records.add({**case.key, "method": "dense"}, lambda: {"top1": percent(uncut() == labels())})
    kind, budgets = ("keep", options.shares) if options.shares else ("macs", options.macs)
    for method in options.methods.split(","):
        cuts = Cuts(case, method)
        for budget in map(float, budgets.split(",")):
            for remedy in REMEDIES:

                def measured(budget: float = budget, remedy: str = remedy, cuts: Cuts = cuts) -> dict[str, Any]:
                    network = copy.deepcopy(case.model)
                    plan, seconds = cuts.plan(kind, budget)
                    ff.apply(plan, network)
                    errors, remedy_seconds = remedied(network, case, plan, remedy)
                    answers = case.answers(network)
                    return {
                        "left": ff.measure(network, case.example).macs / macs,
                        "top1": percent(answers == labels()),
                        "agreement": percent(answers == uncut()),
                        "cut_seconds": seconds,
                        "remedy_seconds": remedy_seconds,
                        **errors,
                    }

                records.add({**case.key, "method": method, "remedy": remedy, kind: budget}, measured)


def percent(right: Tensor) -> float:
    """Share of what is true, in percent."""
    return 100 * float(right.double().mean())


def remedied(network: nn.Module, case: Case, plan: Plan, remedy: str) -> tuple[dict[str, Any], float]:
    """Apply the remedy to the cut network; what it says of itself, and the time that it took."""
    started = time.perf_counter()
    errors: dict[str, Any] = {}
    if remedy == "batch norm":
        ff.reestimate(network, case.calibration, batches=len(case.calibration))
    elif remedy == "repair":
        found = ff.repair(network, case.model, plan, case.calibration, batches=len(case.calibration))
        sides = [[getattr(row, side) for row in found.layers] for side in ("before", "after")]
        errors["mean_layer_error"] = [sum(side) / max(1, len(side)) for side in sides]
    return errors, time.perf_counter() - started


class Cuts:
    """The cuts of a network by one method; what they share is computed once, when it is first asked for."""

    def __init__(self, case: Case, method: str) -> None:
        self.case, self.method = case, method
        self._plans: dict[tuple[str, float], tuple[Plan, float]] = {}
        self._scored: Scored | None = None

    def plan(self, kind: str, budget: float) -> tuple[Plan, float]:
        """The plan for a budget, and the seconds that it took; scores count where they are computed."""
        if (kind, budget) not in self._plans:
            started = time.perf_counter()
            plan = self._fold(kind, budget) if self.method == "fold" else self._drop(kind, budget)
            self._plans[kind, budget] = plan, time.perf_counter() - started
        return self._plans[kind, budget]

    def _fold(self, kind: str, budget: float) -> Plan:
        cutting = CutOptions(seed=self.case.key["seed"], verify=False)
        network = copy.deepcopy(self.case.model)
        within: dict[str, Any] = {kind: budget}
        online = OnlineFilterClustering(network, self.case.example, round_to=1, cutting=cutting, **within)
        return online.cluster_and_prune().plan

    def _drop(self, kind: str, budget: float) -> Plan:
        if self._scored is None:
            ranked = self.method == "reconstruction" and kind == "macs"
            selection = ff.Selection(scope="global" if ranked else "layer")
            rules = Rules(self.method, selection, ff.Scoring(seed=self.case.key["seed"]), verify=False, strict=False)
            self._scored = scored(self.case.model, self.case.example, rules, self.case.calibration)
        return self._scored.planned(Budget(**{kind: budget})).plan


if __name__ == "__main__":
    main()
