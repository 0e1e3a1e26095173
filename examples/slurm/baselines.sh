#!/bin/bash
# Submit token-level fusion on the SFT half: FuseLLM and InfiFusion, which learn from all sources at
# once, and FuseChat, whose models learn from one source each and are merged.
# Usage, from the repository's root, after convert.sbatch: examples/slurm/baselines.sh [JOB]
# JOB: the convert job that it waits for, where that has not ended.
set -euo pipefail
source "${INFIFPO_ENV:-examples/slurm/env.sh}"
mkdir -p "$LOGS" "$RUN/fusion"
[ -e "$RUN/fusion/sources.yaml" ] || ln -s ../sources.yaml "$RUN/fusion/sources.yaml"
sources=$(grep -c '\bname:' "$RUN/sources.yaml")

submit() {
  sbatch --parsable --kill-on-invalid-dep=yes --output="$LOGS/%x-%j.out" "$@"
}
wide=(--nodes="$NODES" --ntasks-per-node="$RANKS" --gpus-per-node="$GPUS")
narrow=(--nodes=1 --ntasks-per-node="$RANKS" --gpus-per-node="$GPUS")
here=examples/slurm

score=$(submit "${narrow[@]}" --array="0-$sources" ${1:+--dependency="afterok:$1"} \
  $here/score_array.sbatch split=sft)
exported=""

# Fuse, train and export by a method, from all sources (0) or from the i-th one.
learn() {
  local name=$1-$2 how=(method="$1" index="$2") fuse train
  fuse=$(submit --job-name="fuse-$name" --dependency="afterok:$score" $here/stage.sbatch fuse "${how[@]}")
  train=$(submit "${wide[@]}" --job-name="$name" --dependency="afterok:$fuse" $here/sft.sbatch "${how[@]}")
  exported=$(submit --job-name="export-$name" --dependency="afterok:$train" $here/stage.sbatch export "${how[@]}")
  echo "$name: fuse $fuse, train $train, export $exported"
}

echo "score $score"
learn fusellm 0
learn infifusion 0
merged=afterok
for ((i = 1; i <= sources; i++)); do
  learn fusechat "$i"
  merged+=":$exported"
done
merge=$(submit --job-name=merge --dependency="$merged" $here/stage.sbatch merge hf="$PIVOT" method=fusechat)
echo "merge $merge"
echo "follow with: squeue --me; logs are in $LOGS"
