"""Score sampled responses and write preference pairs: best and worst of every prompt.

    infifpo label --input phi-4.jsonl qwen.jsonl coder.jsonl --pivot phi-4 \\
        --reward-model models/Skywork-Reward-Gemma-2-27B-v0.2 --bf16 --output pairs.jsonl
    infifpo label --input ... --program checks.py:passes --output pairs.jsonl

Inputs are files of `infifpo sample`, one a model. Scores come from a reward model (the paper's is
the one above) or from a function of yours, `passes(prompt, response) -> number`, which has the data
set's answer or unit tests in `prompt.extra`. A pair is the best and the worst response of all
models, with --pivot also the pivot's own best, for WRPO. Prompts without contrast are left out and
counted. Scores are kept in OUTPUT.scores, so that an interrupted command goes on.
"""

import argparse

from megatron_infifpo.commands.flags import fields_of, take_defaults
from megatron_infifpo.commands.response_flags import add_response_flags
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
        cut="judge responses that were cut at --max-tokens, too",
    )
    parser.add_argument("--pivot", metavar="NAME", help="of the pivot in the inputs, for WRPO")
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="DIR", help="a sequence classifier")
    scorer.add_argument("--program", metavar="FILE.py:FUNCTION")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    for job in (Judge, LabellingJob):
        take_defaults(parser, job)


def run(args: argparse.Namespace) -> None:
    """Write the pairs, and say what gave none."""
    judge = Judge(**fields_of(args, Judge))
    found = label_responses(LabellingJob(judge=judge, **fields_of(args, LabellingJob)))
    print(f"{args.output}: {found.pairs} pairs of {found.prompts} prompts")
    for reason, number in found.dropped.most_common():
        print(f"  left out {number}: {reason}")
    for fault, number in found.unused.most_common():
        print(f"  not judged {number} responses: {fault}")
