#!/bin/bash
# Submit a chain of jobs, one a round: each starts when the one before has succeeded.
# Usage, from the repository's root: examples/slurm/rounds.sh ROUNDS
set -euo pipefail
source "${INFIFPO_ENV:-examples/slurm/env.sh}"
mkdir -p "$LOGS"
wide=(--nodes="$NODES" --ntasks-per-node="$RANKS" --gpus-per-node="$GPUS")

jobs=()
for ((round = 0; round < $1; round++)); do
  after=(${jobs[@]:+--dependency="afterok:${jobs[-1]}"})
  jobs+=("$(sbatch --parsable --kill-on-invalid-dep=yes --output="$LOGS/%x-%j.out" "${wide[@]}" \
    "${after[@]}" examples/slurm/rounds.sbatch "$round")")
done
echo "rounds ${jobs[*]}"
echo "follow with: squeue --me; logs are in $LOGS, and of each stage in $RUN/rounds/round-*/logs"
