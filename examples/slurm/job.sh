# What the job scripts share; they source it from the repository's root.
set -euo pipefail
source "${INFIFPO_ENV:-examples/slurm/env.sh}"
source megatron_infifpo/recipes/slurm/srun.sh
source megatron_infifpo/recipes/slurm/resumable.sh
mkdir -p "$LOGS"
job=$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
container=()
if [ -n "$CONTAINER" ]; then
  container=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$PWD")
else
  source "$VENV/bin/activate"
fi

# Print values of env.sh, each a string in which the shell's quotes count, or an array, as one string.
options() {
  local name
  for name; do
    local -n value=$name
    case "$(declare -p "$name")" in
      "declare -a"*) printf '%s ' "${value[@]@Q}" ;;
      *) printf '%s ' "$value" ;;
    esac
  done
}

# Run a stage on the ranks of this job; each attempt of it has a log of its own. Ranks have a minute
# after the first one ended: killing them at once would hide the exit code of those that say why.
# The command is started as a module: a container has its own Python, and perhaps only this checkout.
step() {
  srun --wait=60 --output="$LOGS/$job-${SLURM_RESTART_COUNT:-0}.log" \
    --open-mode=append "${container[@]}" python -u -m megatron_infifpo launch "$@"
}
