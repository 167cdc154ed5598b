#!/usr/bin/env bash
# What online clustering is worth at full width: VGG-16 on CIFAR-10, 100 epochs, five seeds; then ResNet-56.
#
# In this order, so that a stopped plan has answered the first questions first:
#   1. dense against folding with 35 % of every layer kept: five times faster, and no worse within .5 points?
#   2. the small network from scratch, for the same epochs and for the same compute, and dropping by L1
#   3. the curve of accuracy against measured speed: 70, 50, 20 and 10 % kept
#   4. ResNet-56 with 40 % of its multiply-accumulates, in a run folder of its own
#
#   benchmarks/headline_plan.sh                on a GPU, piece after piece until all is done
#   benchmarks/headline_plan.sh --once         one piece only: exit code 3 while something is left, 0 when all is done
#   benchmarks/headline_plan.sh --tiny         the same at a tiny size on the CPU (embedded digits, one trial)
#   benchmarks/headline_plan.sh --out DIR      where the run folders go (default runs/headline)
#   benchmarks/headline_plan.sh -- OPTIONS     further options for `filterfold compare`, such as --milestones early
#
# A piece takes under ten minutes (PIECE=9m), saves everything and can be killed at any time; the next piece goes on,
# also on another machine that is given the run folders. The margin of .5 points was fixed before any of it was run.
set -euo pipefail
. "$(dirname "$0")/pieces.sh"
options runs/headline "$@"

if [ "$tiny" = yes ]; then
  setting=(--data digits --width 0.25 --epochs 2 --train-limit 200 --trials 1 --device cpu --threads 1
    --latency-batches none)
  vgg=vgg_small resnet=resnet20 curve=0.7
else
  setting=(--data cifar10 --trials 5 --epochs 100 --round-to 16 --margin 0.5
    --device cuda --precision bf16-mixed --channels-last)
  vgg=vgg16 resnet=resnet56 curve=0.7,0.5,0.2,0.1
fi

vgg() {
  pieces compare --model "$vgg" --out "$out/vgg16" "${setting[@]}" "$@"
}

vgg --keep 0.35 --methods dense,online
vgg --keep 0.35 --methods scratch,scratch-long,online-l1
vgg --keep "$curve" --methods online
pieces compare --model "$resnet" --out "$out/resnet56" "${setting[@]}" --round-to 1 --macs 0.4 \
  --methods dense,online,scratch,scratch-long,online-l1
