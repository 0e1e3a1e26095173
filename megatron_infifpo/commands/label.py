"""Score sampled responses and write preference records: pairs of best and worst, or lists.

    infifpo label --input phi-4.jsonl qwen.jsonl coder.jsonl --pivot phi-4 \\
        --reward-model models/Skywork-Reward-Gemma-2-27B-v0.2 --bf16 --output pairs.jsonl
    infifpo label --input ... --program checks.py:passes --output pairs.jsonl
    infifpo label --input policy.jsonl --program checks.py:passes --list 8 --keep-cut \\
        --output lists.jsonl

Inputs are files of `infifpo sample`, one a model. Scores come from a reward model (the paper's is
the one above) or from a function of yours, `passes(prompt, response) -> number`, which has the data
set's answer or unit tests in `prompt.extra`. A pair is the best and the worst response of all
models, with --pivot also the pivot's own best, for WRPO. Prompts without contrast are left out and
counted. Scores are kept in OUTPUT.scores, so that an interrupted command goes on.

With --list N a record has the responses of a prompt with their scores, for fuserlhf (pad needs no
scores: it takes lists as `infifpo sample` writes them, too): the first N in the order in which they
were sampled (of several models the first of each, then the second of each), never the best ones,
and equal ones as often as they were sampled: a policy's list stays a sample of the policy. All
scores may be equal. A prompt needs 2 responses that differ.
"""

import argparse

from megatron_infifpo.commands.flags import fields_of, take_defaults
from megatron_infifpo.commands.response_flags import add_response_flags
from megatron_infifpo.flag_types import real, whole
from megatron_infifpo.responses.labelling import LabellingJob, label_responses
from megatron_infifpo.responses.scorers import Judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add responses and their judge."""
    add_response_flags(
        parser,
        input_form="FILE",
        bad="line that is malformed or cannot be judged, or leave such lines",
        bf16="the reward model in bfloat16",
        batch="responses at once",
        cut="judge responses that were cut at --max-tokens, too, and mark them as such",
    )
    parser.add_argument(
        "--list", dest="longest", type=whole(2), metavar="N",
        help="write lists of N responses at most, in the order in which they were sampled "
        "(default: pairs)",
    )  # fmt: skip
    parser.add_argument(
        "--cut-penalty", type=real(0), metavar="X",
        help="subtracted from the score of a response that was cut, in lists with --keep-cut "
        "(default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--pivot", metavar="NAME", help="of the pivot in the inputs, for WRPO")
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="DIR", help="a sequence classifier")
    scorer.add_argument("--program", metavar="FILE.py:FUNCTION")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    for job in (Judge, LabellingJob):
        take_defaults(parser, job)


def job_of(args: argparse.Namespace) -> LabellingJob:
    """Return what is judged, and by whom."""
    judge = Judge(**fields_of(args, Judge))
    return LabellingJob(judge=judge, **fields_of(args, LabellingJob))


def run(args: argparse.Namespace) -> None:
    """Write the records, and say what gave none."""
    job = job_of(args)
    found = label_responses(job)
    print(f"{args.output}: {found.lengths.total()} {job.kind} of {found.prompts} prompts")
    if job.longest is not None:
        print(f"  {sum(n * count for n, count in found.lengths.items())} responses")
        for length, number in sorted(found.lengths.items()):
            if length < job.longest:
                print(f"  {number} lists have {length} responses, fewer than {job.longest}")
    for line in found.left_out:
        print(f"  {line}")
