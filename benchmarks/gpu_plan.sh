#!/usr/bin/env bash
# The document's experiment: the original algorithm and online clustering with k = 5 … 30, five trials each, on VGG-16
# and CIFAR-10. Thirty-five trials, and the dense networks that the original algorithm begins with, as a control.
#
#   benchmarks/gpu_plan.sh                on a GPU, piece after piece until all is done
#   benchmarks/gpu_plan.sh --once         one piece only: exit code 3 while something is left, 0 when all is done
#   benchmarks/gpu_plan.sh --tiny         the same at a tiny size on the CPU (embedded digits, two trials)
#   benchmarks/gpu_plan.sh --out DIR      where records, networks and the report go (default runs/document)
#   benchmarks/gpu_plan.sh -- OPTIONS     further options for `filterfold compare`
#
# A piece takes under ten minutes (PIECE=9m), saves everything and can be killed at any time; the next piece goes on,
# also on another machine that is given the run folder.
set -euo pipefail
. "$(dirname "$0")/pieces.sh"
options runs/document "$@"

if [ "$tiny" = yes ]; then
  setting=(--data digits --model vgg_small --width 0.25 --epochs 2 --train-limit 200 --clusters 2,4 --trials 2
    --device cpu --threads 1 --latency-batches none)
else
  setting=(--data cifar10 --model vgg16 --clusters 5,10,15,20,25,30 --trials 5 --epochs 100
    --device cuda --precision bf16-mixed --channels-last)
fi

pieces compare --methods dense,l1,online --out "$out" "${setting[@]}"
