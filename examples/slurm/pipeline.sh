#!/bin/bash
# Submit a whole run: each job starts when those that it needs have succeeded.
# Usage, from the repository's root: examples/slurm/pipeline.sh
set -euo pipefail
source "${INFIFPO_ENV:-examples/slurm/env.sh}"
mkdir -p "$LOGS"
sources=$(grep -c '\bname:' "$RUN/sources.yaml")

submit() {
  sbatch --parsable --kill-on-invalid-dep=yes --output="$LOGS/%x-%j.out" "$@"
}
wide=(--nodes="$NODES" --ntasks-per-node="$RANKS" --gpus-per-node="$GPUS")
narrow=(--nodes=1 --ntasks-per-node="$RANKS" --gpus-per-node="$GPUS")
here=examples/slurm

convert=$(submit $here/convert.sbatch)
score=$(submit "${narrow[@]}" --array="1-$sources" $here/score_array.sbatch)
sft=$(submit "${wide[@]}" --dependency="afterok:$convert" $here/sft.sbatch)
initial=$(submit "${narrow[@]}" --array=0 --dependency="afterok:$sft" $here/score_array.sbatch)
train=$(submit "${wide[@]}" --dependency="afterok:$convert:$score:$initial" $here/train.sbatch)
export=$(submit --dependency="afterok:$train" $here/export.sbatch)

echo "convert $convert, score $score, sft $sft, score the initial pivot $initial, train $train, export $export"
echo "follow with: squeue --me; logs are in $LOGS"
