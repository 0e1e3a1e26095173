# Run the function `step` of the script that sources this, which can be stopped at any time. At USR1,
# which comes before the time limit, the ranks of its steps get SIGTERM (training saves), and the job
# is queued again when they ended. So it is when they died, of a lost node for example; not when they
# exited with 2: that is for a person to mend.
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
