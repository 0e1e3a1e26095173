# Values of your site and of your run: the only file to change. Every job sources it, from the
# repository's root; what is already set in the environment wins.
# LAYOUT, PREPARE, SFT, TRAIN, SCORE, INITIAL, FUSE and MERGE hold NAME=VALUE words. A value with spaces, such as
# several flags, is quoted inside the string, or the whole is an array:
#   TRAIN='micro_batch_tokens=4096 flags="--recompute-granularity full --recompute-method uniform"'
#   TRAIN=(micro_batch_tokens=4096 flags="--recompute-granularity full --recompute-method uniform")

# With RUN_FILE=run.yaml, what that file says comes first (docs/one-file.md): nodes, ranks, pivot, method,
# options of trainings. infifpo fuse makes the same run without these scripts.
[ -z "${RUN_FILE:-}" ] || eval "$(python -m megatron_infifpo show "$RUN_FILE" --shell)"

# Whom to charge and where to run; sbatch reads these itself. Leave out what your cluster defaults.
#export SBATCH_ACCOUNT=research SBATCH_PARTITION=h100 SBATCH_QOS=normal

: "${VENV:=.venv}"             # virtual environment on a file system that all nodes see, or
: "${CONTAINER:=}"             # an image for pyxis, in its place
: "${MOUNTS:=$PWD}"            # of the container, separated by commas

: "${NODES:=2}"                # of training
: "${RANKS:=8}"                # of a node, one a GPU
: "${GPUS:=$RANKS}"            # of a node

: "${RUN:=runs/phi4}"          # folder of the run: data/*.jsonl and sources.yaml are there
: "${PIVOT:=models/phi-4}"     # Hugging Face folder
: "${METHOD:=infifpo}"
: "${LOGS:=$RUN/logs}"
: "${RETRIES:=3}"              # how often a job that died is queued again
: "${LAYOUT:=tensor=2 pipeline=2}"  # of training; sources say theirs in sources.yaml
: "${SFT:=}"                   # further options of SFT (infifpo launch show sft)
: "${TRAIN:=}"                 # and of preference training (infifpo launch show infifpo)
: "${SCORE:=}"                 # and of scoring (infifpo launch show score)
: "${PREPARE:=}"               # and of tokenizing for the pivot (infifpo launch show prepare)
: "${INITIAL:=}"               # and of scoring the initial pivot, after SCORE: its template as above
: "${FUSE:=}"                  # of soft targets (infifpo launch show fuse): baselines.sh
: "${MERGE:=}"                 # and of merging models (infifpo launch show merge)
: "${ROUNDS:=}"                # of infifpo rounds, what is not in rounds.sbatch (docs/rounds.md)
