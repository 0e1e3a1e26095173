#!/usr/bin/env python
"""Score sampled responses and write preference pairs: best and worst of every prompt.

    python tools/label_responses.py --input phi-4.jsonl qwen.jsonl coder.jsonl --pivot phi-4 \\
        --reward-model models/Skywork-Reward-Gemma-2-27B-v0.2 --bf16 --output pairs.jsonl
    python tools/label_responses.py --input ... --program checks.py:passes --output pairs.jsonl

Inputs are files of tools/sample_responses.py, one a model. Scores come from a reward model (the
paper's is the one above) or from a function of yours, `passes(prompt, response) -> number`, which
has the data set's answer or unit tests in `prompt.extra`. A pair is the best and the worst response
of all models, with --pivot also the pivot's own best, for WRPO. Prompts without contrast are left
out and counted. Scores are kept in OUTPUT.scores, so that an interrupted command goes on.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.read_report import report_skipped
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.records.split import to_json
from megatron_infifpo.responses.labels import label, read_responses
from megatron_infifpo.responses.scorers import Scorer, program_scorer, reward_scorer
from megatron_infifpo.storage.documents import publish


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=".jsonl")
    parser.add_argument("--pivot", metavar="NAME", help="of the pivot in the inputs, for WRPO")
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="DIR", help="a sequence classifier")
    scorer.add_argument("--program", metavar="FILE.py:FUNCTION")
    parser.add_argument("--bf16", action="store_true", help="the reward model in bfloat16")
    parser.add_argument("--batch", type=positive, default=8, help="responses at once (default: 8)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument(
        "--on-bad-record", choices=ON_BAD, default="error",
        help="stop at the first line that is malformed or cannot be judged, or leave such lines "
        "out (default: error)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-cut", action="store_true",
        help="judge responses that were cut at --max-tokens, too (default: left out)",
    )  # fmt: skip
    return parser.parse_args()


def open_scorer(args: argparse.Namespace) -> tuple[Scorer, str]:
    """Load the judge; return it with what it is.

    Raises:
        UserError: there is none.
    """
    if args.program:
        score = program_scorer(args.program)
        code = Path(args.program.rpartition(":")[0]).read_bytes()
        name = f"{args.program} {hashlib.sha256(code).hexdigest()}"
    else:
        name = f"{Path(args.reward_model).resolve()} {'bfloat16' if args.bf16 else 'float32'}"
        score = reward_scorer(
            args.reward_model,
            bf16=args.bf16,
            batch=args.batch,
            trust_remote_code=args.trust_remote_code,
        )
    return score, name


def main() -> None:
    """Parse the command line, score, and write the pairs."""
    args = parse()
    if args.output.exists():
        raise UserError(f"{args.output} exists: delete it or choose another name")
    skipped: list[str] | None = [] if args.on_bad_record == "skip" else None
    unused: Counter[str] = Counter()
    responses = read_responses(args.input, keep_cut=args.keep_cut, skipped=skipped, dropped=unused)
    report_skipped(skipped or [])
    if args.pivot is not None:
        models = sorted({m for r in responses.values() for given in r.models for m in given})
        if args.pivot not in models:
            raise UserError(f"--pivot is {args.pivot!r}, expected one of {', '.join(models)}")
    score, name = open_scorer(args)
    dropped: Counter[str] = Counter()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    aside, cache = Path(f"{args.output}.partial"), Path(f"{args.output}.scores")
    count = 0
    with aside.open("w", encoding="utf-8") as file:
        bar = tqdm(responses.values(), desc="label", unit="prompt")
        skip = args.on_bad_record == "skip"
        for record in label(bar, score, name, cache, args.pivot, dropped, skip=skip):
            file.write(json.dumps(to_json(record), ensure_ascii=False) + "\n")
            count += 1
    if not count:
        aside.unlink()
        unused_ones = f"; responses that are not judged: {dict(unused)}" if unused else ""
        raise UserError(f"no prompt gives a pair: {dict(dropped)}{unused_ones}")
    publish(str(args.output))
    print(f"{args.output}: {count} pairs of {len(responses)} prompts")
    for reason, number in dropped.most_common():
        print(f"  left out {number}: {reason}")
    for fault, number in unused.most_common():
        print(f"  not judged {number} responses: {fault}")


if __name__ == "__main__":
    run(main)
