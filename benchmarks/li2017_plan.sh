#!/usr/bin/env bash
# Table 1 of Li et al. 2017, all CIFAR-10 rows with their full schedules: base training, pruning, retraining, and the
# twins from scratch, three seeds each.
#
#   benchmarks/li2017_plan.sh                on a GPU, piece after piece until all is done
#   benchmarks/li2017_plan.sh --once         one piece only: exit code 3 while something is left, 0 when all is done
#   benchmarks/li2017_plan.sh --tiny         one row at a tiny size on the CPU (embedded digits)
#   benchmarks/li2017_plan.sh --out DIR      where the run folders go (default runs/li2017)
#   benchmarks/li2017_plan.sh -- OPTIONS     further options for `filterfold recipe run`, such as --retrain cosine
#
# A piece takes under ten minutes (PIECE=9m), saves everything and can be killed at any time; the next piece goes on.
set -euo pipefail
. "$(dirname "$0")/pieces.sh"
options runs/li2017 "$@"

if [ "$tiny" = yes ]; then
  rows=(resnet56-b)
  setting=(--data digits --width 0.25 --epochs-scale 0.01 --train-limit 100 --device cpu --threads 1 --latency-batches none)
else
  rows=(vgg16-a resnet56-a resnet56-b resnet110-a resnet110-b)
  setting=(--seeds 0,1,2 --device cuda --precision bf16-mixed --channels-last)
fi

for row in "${rows[@]}"; do
  pieces recipe run "$row" "${setting[@]}" --out "$out/$row"
done
