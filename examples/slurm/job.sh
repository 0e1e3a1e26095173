# What the job scripts share; they source it from the repository's root.
set -euo pipefail
source "${INFIFPO_ENV:-examples/slurm/env.sh}"
source examples/slurm/srun.sh
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

# Run a stage that can be stopped at any time. At USR1, which comes before the time limit, its ranks
# get SIGTERM (training saves), and the job is queued again when they ended. So it is when they died,
# of a lost node for example; not when they exited with 2: that is for a person to mend.
resumable() {
  local stopping="" status=0 step
  trap 'stopping="stopped by USR1"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  step "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?  # a trapped signal ends a wait, too
  done
  if [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RETRIES" ]; then
    stopping="ended with $status"
  fi
  if [ -n "$stopping" ]; then
    echo "$stopping; queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  return "$status"
}
