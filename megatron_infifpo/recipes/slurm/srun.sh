# srun as it is, but for its exit code, which is the highest of its ranks': those that it killed, as
# they waited for one that had said what is wrong and ended with 2, would hide that. Jobs that end
# with 2 are for a person to mend: nobody queues them again.
srun() {
  local messages status=0
  messages=$(mktemp)
  command srun "$@" 2>"$messages" || status=$?
  cat "$messages" >&2
  if [ "$status" -ne 0 ] && grep -q 'Exited with exit code 2$' "$messages"; then
    status=2
    TORCHX_MAX_RETRIES=0  # nemo-run's
  fi
  rm -f "$messages"
  return "$status"
}
