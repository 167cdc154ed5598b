"""float -> pruned -> pruned + int8: size, accuracy and agreement in ONNX Runtime, and with --time latency.

ResNet-56 on CIFAR-10, calibrated on training images; EfficientNet-Lite0 on one half of a sample of ImageNet
photos, calibrated on images of the other. Both are cut without training: `reconstruction` ranked over all layers, then
kernels solved anew. Agreement is with the uncut network in float32.

    python benchmarks/int8.py SHARED --models resnet56 --macs 0.6 --calibration 256 --images 2000
    python benchmarks/int8.py SHARED --models lite0 --macs 0.9 --calibration 32 --batch 16 --images 200  [--time]

Writes results/int8.json, a record for each network; what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from without_training import case, photos

import filterfold as ff
from filterfold import data
from filterfold.bench.exported import compare_exported
from filterfold.data.splits import Split
from filterfold.utils.environment import command, describe
from filterfold.utils.io import write_json


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", default="resnet56", help="of the zoo, or lite0")
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--calibration", type=int, default=256, help="images to score, repair and quantise on")
    parser.add_argument("--images", type=int, default=2000, help="test images, the first ones")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--time", action="store_true", help="also time the networks, in turn, with an A/A control")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/int8.json"))
    options = parser.parse_args()
    options.width = 1.0
    torch.set_num_threads(options.threads)
    known = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for name in options.models.split(","):
        asked = {
            "model": name,
            "macs": options.macs,
            "calibration_images": options.calibration,
            "test_images": options.images,
            "timed": options.time,
        }
        if any(all(row[key] == value for key, value in asked.items()) for row in known):
            continue
        known.append({**asked, **measured(name, options)})
        write_json(options.out, {"what": "float, pruned, pruned + int8, in ONNX Runtime", "rows": known})
    print("written:", options.out)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A network's record."""
    found = case(name, None, 0, options)
    small, images = copy.deepcopy(found.model), found.calibration
    cut = ff.prune(small, found.example, macs=options.macs, criterion="reconstruction", scope="global", loader=images)
    print(cut, flush=True)
    print(ff.repair(small, found.model, cut.plan, images, batches=len(images)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("float", "pruned", "pruned + int8")}
        ff.to_onnx(found.model, found.example, files["float"])
        ff.to_onnx(small, found.example, files["pruned"])
        ff.to_int8(small, found.example, files["pruned + int8"], images)
        sizes = (1, 64) if options.time else ()
        compared = compare_exported(files, test(name, options), found.example, batch_sizes=sizes)
    for line in compared.table():
        print(*line, sep="\t", flush=True)
    costs = {"before": cut.before.macs, "after": cut.after.macs}
    about = {"command": command(), "environment": describe(), "onnxruntime": onnxruntime.__version__}
    return {"macs_of_one_image": costs, **compared.to_dict(), **about}


def test(name: str, options: argparse.Namespace) -> Split:
    """The test images of `without_training.case`, as a split."""
    if name != "lite0":
        images = data.load(str(options.shared / "data" / "cifar10"), normalization="imagenet").test
        return images.take(torch.arange(options.images))
    inputs, labels = photos(options.shared / "data" / "imagenet-sample", 224)
    half = slice(len(inputs) // 2, len(inputs) // 2 + options.images)
    return Split(inputs[half], labels[half], ((127 / 255,) * 3, (128 / 255,) * 3))


if __name__ == "__main__":
    main()
