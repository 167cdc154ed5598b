#!/usr/bin/env bash
# What helps an online method, and what doesn't: quarter-width VGG-16, 25,000 images of CIFAR-10, 10 epochs, on a CPU.
#
# Half of every layer is kept (3.9 times fewer multiply-accumulates), or the same share of the multiply-accumulates with
# widths that clustering chooses. All controls of the same schedule, the original algorithm with 3 epochs of retraining,
# the small network from scratch for the same epochs, for what `online` costs, and for .7 of what the dense one costs.
# About an hour and a half a seed on one core; what is done is not done again, so it may be stopped at any time.
# Also k filters in every layer, one seed. Inference is timed when all trials are done: let the machine be quiet then.
#
#     bash benchmarks/ablation.sh [seeds, default 3] [run folder, default results/ablation] [trials at a time, default 1]
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-3} out=${2:-results/ablation} parallel=${3:-1}

step() {
    filterfold compare --data cifar10 --train-limit 25000 --model vgg16 --width 0.25 --epochs 10 --lr 0.15 \
        --schedule onecycle --channels-last --retrain-epochs 3 --retrain-lr 0.01 --threads 1 --device cpu \
        --trials "$seeds" --out "$out" --parallel "$parallel" "$@"
}

step --macs 0.256 --methods online --latency-batches none
step --clusters 5,10,20,30 --methods online --trials 1 --latency-batches none
step --keep 0.5 --methods \
    dense,l1,scratch,scratch-long,scratch+longer,online,online-l1,online-random,online-fpgm,online-centroid,online+repair,online+distill,online+longer,online+early+longer
