"""Command lines of the stages: what sbatch scripts and nemo-run start, word for word."""

import shlex

import pytest

from megatron_infifpo.cli import UserError, ranks_from_srun
from megatron_infifpo.recipes.commands import STAGES

TRAINING = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather --sequence-parallel --bf16 "
    "--preference-epochs {epochs} --lr {lr} --lr-decay-style cosine "
    "--lr-warmup-fraction 0.1 --global-batch-size 128 --micro-batch-tokens 8192 --seq-length 4096 "
    "--pretrained-checkpoint run/{load} --save run/{save} --save-interval 100 --log-interval 1 "
    "--tensorboard-dir run/{save}/tensorboard --exit-signal-handler"
)
SFT = TRAINING.format(epochs=3, lr="1e-06", load="pivot", save="sft")
INFIFPO = TRAINING.format(epochs=1, lr="1e-07", load="sft", save="infifpo")
# (stage, options) -> what follows `python`
GOLDEN = {
    ("convert", ""): "tools/convert_checkpoint.py import --hf models/phi-4 --save run/pivot "
    "--dtype bf16",
    ("prepare", "split=sft"): "tools/prepare_preferences.py --input run/data/sft.jsonl "
    "--tokenizer models/phi-4 --output run/data/sft",
    ("score", ""): "tools/score_source.py --bf16 --backend megatron --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 1 --model run/sft --name initial "
    "--input run/data/preference.jsonl --output run/logprobs/initial",
    ("score", "index=4"): "tools/score_source.py --bf16 --backend megatron "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 "
    "--model models/Qwen2.5-Coder-14B-Instruct --name qwen2.5-coder-14b "
    "--input run/data/preference.jsonl --output run/logprobs/qwen2.5-coder-14b --domains code",
    ("sft", ""): f"-m megatron_infifpo.train --method sft --preference-data run/data/sft {SFT}",
    ("infifpo", "method=infifpo beta=2.5"): "-m megatron_infifpo.train --method infifpo "
    "--preference-data run/data/preference --preference-sources run/sources.yaml --beta 2.5 "
    + INFIFPO,
    ("export", ""): "tools/convert_checkpoint.py export --load run/infifpo --save run/infifpo-hf",
}


def parse(stage: str, options: str):
    """The job that tools/launch.py starts for such options."""
    from workers import load_tool

    read = load_tool("launch").read_options(stage, ["run=run", *options.split()])
    return STAGES[stage](**read)


@pytest.mark.parametrize(("stage", "options"), GOLDEN)
def test_golden(run_folder, stage, options):
    job = parse(stage, options)
    assert " ".join(job.arguments) == GOLDEN[stage, options]
    assert job.every_rank == (stage in ("score", "sft", "infifpo"))


@pytest.mark.parametrize(("stage", "options"), [key for key in GOLDEN if "train" in GOLDEN[key]])
def test_training_flags_exist(run_folder, stage, options, monkeypatch):
    """Megatron's parser takes every word."""
    from workers import load_tool  # noqa: F401  (makes the CPU stand-ins)

    import megatron_infifpo.train as program

    job = parse(stage, options)
    monkeypatch.setattr("sys.argv", list(job.arguments[1:]))
    args, _ = program.parse_arguments()
    assert args.exit_signal_handler and args.micro_batch_tokens == 8192


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("score", "index=6", "has 5 sources, but index is 6"),
        ("infifpo", "betta=1", "betta=1: expected NAME=VALUE, NAME one of run, method, beta"),
        ("infifpo", "epochs=two", "epochs=two: expected int"),
        ("infifpo", "bf16=3", "bf16=3: expected bool"),
    ],
)
def test_refused(run_folder, stage, options, message):
    with pytest.raises(UserError, match=message):
        parse(stage, options)


def test_shown_as_a_shell_takes_it(run_folder):
    job = parse("sft", "")
    assert shlex.split(str(job)) == ["python", *job.arguments]


STEP = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_ID": "7",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_ranks_from_srun():
    environment = dict(STEP)
    ranks_from_srun(environment)
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    expected |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": str(20000 + 7 * 16)}
    assert environment == STEP | expected


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},  # a batch script
        STEP | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun under srun
        {},
    ],
)
def test_no_ranks_of_srun(environment):
    given = dict(environment)
    ranks_from_srun(given)
    assert given == environment
