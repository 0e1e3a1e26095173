"""Train in rounds on the policy's own samples: sample, label, score, train, export, again.

    infifpo rounds --output runs/rounds --pivot models/phi-4 --prompts prompts.jsonl \\
        --method fuserlhf --sources sources.yaml --rounds 10 --steps 8 --round-prompts 1024 \\
        --count 8 --launcher "torchrun --nproc-per-node 8" \\
        --sample-options "--engine vllm --bf16 --max-tokens 2048" \\
        --label-options "--reward-model models/Skywork-Reward-Gemma-2-27B-v0.2 --bf16" \\
        --score-options "--bf16 --tensor-model-parallel-size 2" \\
        --train-options "--bf16 --lr 1e-6 --global-batch-size 128 --micro-batch-tokens 24576 \\
            --seq-length 4096 --tensor-model-parallel-size 2 --use-distributed-optimizer"

Each round samples --count responses to its prompts from the policy as it is, at temperature 1, has
them judged, scores them under the given pivot and every source of sources.yaml (by its `score`),
trains --steps steps, and exports. The references stay those of the given pivot. Every stage is a
command of this program, skipped where it is done: give the same command again after an
interruption, wherever that was; with more --rounds to go on. Methods of lists (fuserlhf, pad) see
all responses to a prompt, the others the best and the worst. docs/rounds.md says more.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_infifpo.commands.flags import fields_of, take_defaults
from megatron_infifpo.commands.main import make_parser
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.recipes.ends import StageError, StoppedError
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.references.sources import INITIAL
from megatron_infifpo.rounds.inputs import check_inputs
from megatron_infifpo.rounds.job import OPTIMIZERS, STAGES, RoundsJob
from megatron_infifpo.rounds.run import all_done, dry_run, run_rounds
from megatron_infifpo.rounds.stages import import_pivot, stages_of

if TYPE_CHECKING:
    from megatron_infifpo.responses.sample import SamplingJob
    from megatron_infifpo.training.config import RunConfig

WHAT = {
    "import": "the pivot",
    "sample": "responses: the engine, --max-tokens, ...",
    "label": "them: --reward-model or --program, --cut-penalty, ...",
    "prepare": "records for the pivot",
    "score": "models; those of a source in sources.yaml go first",
    "initial": "the given pivot; they go first, too: its chat template, say",
    "train": "the policy: Megatron's flags, and the method's",
    "export": "the policy",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what rounds are made of, and the words that go to their stages."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of all rounds")
    parser.add_argument("--pivot", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--prompts", required=True, nargs="+", metavar="FILE[=COUNT]",
        help="the pool, as infifpo sample reads it: each prompt comes once an epoch",
    )  # fmt: skip
    bad = (
        "stop at the first malformed prompt, or leave out such, and those that a stage cannot take"
    )
    parser.add_argument("--on-bad-record", choices=ON_BAD, help=f"{bad} (default: %(default)s)")
    parser.add_argument("--method", required=True, help="of infifpo train; not of wrpo's kind")
    parser.add_argument("--sources", metavar="FILE", help="sources.yaml, each with its `score`")
    parser.add_argument("--rounds", type=positive, required=True, help="how many in all")
    parser.add_argument("--steps", type=positive, required=True, help="of training, a round")
    parser.add_argument(
        "--round-prompts", type=positive, required=True, metavar="N", help="prompts of a round"
    )
    parser.add_argument(
        "--count", type=whole(2), help="responses to a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS,
        help="one training run through all rounds, or a run a round (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole(0), help="of prompts and samples (default: 1234)")
    parser.add_argument(
        "--sampler-check", action=argparse.BooleanOptionalAction,
        help="begin no round whose sampler has other weights than the trainer (default: check)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-rounds", type=positive, metavar="K",
        help="delete checkpoints and exports of older rounds (default: keep all)",
    )  # fmt: skip
    where = parser.add_argument_group("how it runs")
    where.add_argument(
        "--launcher", metavar="WORDS",
        help="what starts scoring and training, up to -m: 'torchrun --nproc-per-node 8', 'srun "
        "python' (default: as --python)",
    )  # fmt: skip
    where.add_argument(
        "--python", metavar="WORDS", help="what starts all else, likewise (default: this Python)"
    )
    where.add_argument(
        "--until", type=whole(0), metavar="ROUND",
        help="end after this round, counted from 0 (default: the last)",
    )  # fmt: skip
    where.add_argument(
        "--allow-changed-settings", action="store_true",
        help="go on with other settings than rounds.json says",
    )  # fmt: skip
    where.add_argument("--dry-run", action="store_true", help="print all commands, run none")
    words = parser.add_argument_group(
        "further words of a stage", "in one string, quoted as for a shell"
    )
    for stage in STAGES:
        text = f"how to {'score' if stage == INITIAL else stage} {WHAT[stage]}"
        words.add_argument(f"--{stage}-options", default="", metavar="WORDS", help=text)
    take_defaults(parser, RoundsJob)


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse words; what follows --STAGE-options is its value, even where it is one flag."""
    flags, found = {f"--{stage}-options" for stage in STAGES}, list[str]()
    for word in words:
        if found and found[-1] in flags:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return parser.parse_args(found)


def run(args: argparse.Namespace) -> int:
    """Run the rounds, or print what would run.

    Raises:
        UserError: as `RoundsJob` and `run_rounds`.
    """
    environment = dict(os.environ)  # as it is before Megatron is imported, which changes it
    given = {stage: getattr(args, f"{stage}_options") for stage in STAGES}
    options = {stage: words for stage, words in given.items() if words}
    job = RoundsJob(**fields_of(args, RoundsJob), options=options)
    training = check_words(job)
    if args.dry_run:
        dry_run(job)
        return 0
    print(a_round(job, training.flags["global_batch_size"]), flush=True)
    try:
        if not all_done(job):
            check_inputs(job, environment)
        run_rounds(job, environment=environment)
    except StoppedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.code
    except StageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def a_round(job: RoundsJob, batch: int | None) -> str:
    """Say how often a round goes over its prompts.

    Args:
        job: the rounds.
        batch: records of a step, where that is known.
    """
    if batch is None:
        return f"a round is {job.steps} steps on {job.round_prompts} prompts"
    times = job.steps * batch / job.round_prompts
    return (
        f"a round is {job.steps} steps of {batch} records: {times:.2f} times its "
        f"{job.round_prompts} prompts"
    )


def check_words(job: RoundsJob) -> "RunConfig":
    """Make the jobs of all stages from their words, before the first one has run for hours.

    Those of the first round and of the last one: they differ.

    Returns:
        The last round's training.

    Raises:
        UserError: one cannot be, or they do not go together.
    """
    for number in sorted({0, job.rounds - 1}):
        made: dict[str, Any] = {}
        for stage in (import_pivot(job), *stages_of(job, number)):
            name, *words = stage.job.arguments
            module, parser = make_parser(name)
            flags = refusing(parser, words_of(stage.name)).parse_args(words)
            try:
                made[name] = module.job_of(flags) if hasattr(module, "job_of") else None
            except UserError as error:
                raise UserError(f"{stage.name}: {error}") from None
        check_together(job, made["sample"], made["train"])
    training: RunConfig = made["train"]
    return training


def words_of(stage: str) -> str:
    """Say where a user gives words of a stage."""
    if stage == f"score-{INITIAL}":
        return f"--score-options or --{INITIAL}-options"
    if stage.startswith("score-"):
        return f"--score-options, or {stage.removeprefix('score-')}'s `score` in sources.yaml"
    return f"--{stage}-options"


def refusing(parser: argparse.ArgumentParser, place: str) -> argparse.ArgumentParser:
    """Let a parser say where the words stand that it cannot read, instead of its usage."""

    def error(message: str) -> NoReturn:
        raise UserError(f"{place}: {message}")

    parser.error = error  # type: ignore[method-assign]
    return parser


def check_together(job: RoundsJob, sampling: "SamplingJob", run: "RunConfig") -> None:
    """Refuse sampling that training cannot use.

    Raises:
        UserError: it measures no log-probs to compare, or samples more than a row holds.
    """
    if job.sampler_check and (sampling.engine == "server" or not sampling.check):
        given = "--engine server" if sampling.check else "--check 0"
        raise UserError(
            f"--sample-options has {given}, with which no log-probs are there to tell whether the "
            "sampler has the trainer's weights: leave it out, or give --no-sampler-check"
        )
    count = job.count if job.kind.responses is None else job.kind.responses
    each = min(sampling.how.max_tokens, run.flags["seq_length"] or sampling.how.max_tokens)
    if run.micro_batch_tokens is not None and run.micro_batch_tokens < count * each:
        raise UserError(
            f"--train-options has --micro-batch-tokens {run.micro_batch_tokens}, but {count} "
            f"responses of {each} tokens, which sampling may give, are {count * each}, and a "
            "record is one row: raise it to that and the longest prompt, or lower "
            + ("--count or " if count == job.count else "")
            + "--max-tokens in --sample-options"
        )
