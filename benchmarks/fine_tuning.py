"""What cutting at the start of fine-tuning keeps: EfficientNet-Lite0 with ImageNet weights on images of one's own.

    python benchmarks/fine_tuning.py SHARED                    Tiny-ImageNet at 96 px, 20,000 images, 4 epochs, 3 seeds
    python benchmarks/fine_tuning.py SHARED --data cifar10     5,000 images of CIFAR-10 at 64 px, the same otherwise
    python benchmarks/fine_tuning.py SHARED --seeds 1 --stop-after 20m

All start from the same weights with a classifier drawn anew, and are trained alike: `dense` is not cut; the others have
60 or 40 % of the multiply-accumulates from the first step on: chosen by `reconstruction-then-train` and repaired (with
`+longer` trained for what dense costs), or by `reconstruction`, or the filters of least L1 norm dropped, or chance.
`scratch` is as wide and has fresh weights; the same epochs cost it the same. Further options are those of
`filterfold compare`; it goes on where it was stopped. Classes of Tiny-ImageNet are classes of ImageNet too, so there
the gap to fresh weights is wider than on other images; CIFAR-10's are other images.

SHARED has `data/tiny-imagenet`, `data/cifar10` and `weights/tf_efficientnet_lite0-imagenet.safetensors`.
"""

import argparse
import sys
from pathlib import Path

from conformance.torchvision_shim import declare_missing_operators

declare_missing_operators()  # also in the processes that --parallel starts

STUDIES = {
    "tiny-imagenet": ["--image-size", "96", "--validation", "500"],
    "cifar10": ["--image-size", "64", "--validation", "500", "--train-limit", "5000"],
}
RECIPE = (
    "--epochs 4 --batch-size 64 --optimizer adamw --lr 0.001 --head-lr 3 --weight-decay 0.02 --schedule warmup-cosine "
    "--warmup 0.05 --label-smoothing 0.1 --channels-last --validate-every 4"
)
CUTS = "--macs 0.6,0.4 --milestones 0 --latency-batches 1,64"
METHODS = (
    "online-reconstruction-then-train+repair",
    "dense",
    "online-l1",
    "scratch",
    "online-reconstruction+repair",
    "online-reconstruction-then-train+repair+longer",
    "online-random",
)


def main() -> None:
    """Read the command line; run the trials seed by seed, the most telling ones first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--data", choices=STUDIES, default="tiny-imagenet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: results/fine_tuning_DATA")
    options, more = parser.parse_known_args()
    from filterfold.cli import main as filterfold

    out = options.out or Path("results") / f"fine_tuning_{options.data.replace('-', '_')}"
    weights = options.shared / "weights" / "tf_efficientnet_lite0-imagenet.safetensors"
    sys.argv = [
        "filterfold",
        "compare",
        "--model",
        "timm:tf_efficientnet_lite0",
        "--weights",
        str(weights),
        "--new-head",
    ]
    sys.argv += ["--data", str(options.shared / "data" / options.data), "--out", str(out), *STUDIES[options.data]]
    sys.argv += [*RECIPE.split(), *CUTS.split(), "--methods", ",".join(METHODS), "--trials", str(options.seeds), *more]
    filterfold()


if __name__ == "__main__":
    main()
