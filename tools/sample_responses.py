#!/usr/bin/env python
"""Sample responses of a model to prompts: the first step from prompts to preference pairs.

    python tools/sample_responses.py --model models/phi-4 --as pivot --engine vllm --bf16 \\
        --input infinity.jsonl=60000 numina.parquet=45000 kodcode.parquet=45000 --output phi-4.jsonl
    python tools/sample_responses.py --model models/coder --as source --domains code ...

Prompts are read from this program's records, preference records, conversations, and
Infinity-Instruct, NuminaMath-1.5 and KodCode as they are published; FILE=COUNT takes so many.
`--as` presets what the paper did: 8 responses of the pivot, 4 of each source, at temperature 0.8.
Responses that are cut at --max-tokens or empty are left out and asked for again; reasoning is kept
apart from the answer. First, the engine's log-probs of a few responses are compared with the
scorer's. Finished shards are kept: run an interrupted command again. Several processes or array
tasks share a job with --part 0/4, 1/4, ...
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from megatron_infifpo.commands.entry import run
from megatron_infifpo.engine.hf_model import check_folder
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.responses.completing import Wanted
from megatron_infifpo.responses.engines import (
    Engine,
    NotMeasuredError,
    Sampling,
    TransformersEngine,
)
from megatron_infifpo.responses.logprob_check import TOLERANCE, check_engine, open_scorer
from megatron_infifpo.responses.prompts import Prompt, read_prompts
from megatron_infifpo.responses.sampling import outcome, run_job
from megatron_infifpo.responses.server import ServerEngine
from megatron_infifpo.responses.vllm_engine import VllmEngine
from megatron_infifpo.tokens.flags import (
    add_tokenizer_flags,
    open_tokenizer,
    read_options,
)
from megatron_infifpo.tokens.tokenization import ChatTokenizer

PRESETS = {"pivot": 8, "source": 4}


def main() -> None:
    """Parse the command line and sample."""
    args = parse()
    prompts = read(args)
    number, _, parts = args.part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise UserError(f"--part is {args.part}, expected I/N with I from 0 to N - 1")
    if args.output is not None and args.output.exists():
        if int(parts) > 1:  # another part has joined it
            print(f"{args.output} is complete already")
            return
        raise UserError(f"{args.output} exists: delete it or choose another name")
    greedy = args.temperature == 0
    count = 1 if greedy else args.count or PRESETS[args.preset]
    if greedy and (args.count or 1) > 1:
        print("temperature 0: one response of a prompt, all others would be the same")
    how = Sampling(count, args.temperature, args.top_p, args.max_tokens, args.seed)
    wanted = Wanted(count, 0 if greedy else args.retries, args.keep_cut)
    model = args.name or Path(args.model).resolve().name
    engine, chat = open_engine(args, how)
    check(args, engine, chat, prompts)
    if args.check_only:
        return
    plan = {"model": model, "engine": args.engine, "bf16": args.bf16, "batch": args.batch}
    plan |= {"chat_template": args.chat_template, "template_options": args.template_options}
    if chat is not None and args.engine != "server":
        plan |= {"folder": str(Path(args.model).resolve()), **chat.fingerprint()}
    complete = run_job(
        prompts,
        engine,
        args.output,
        {**plan, **vars(how)},
        wanted,
        shard_prompts=args.shard_prompts,
        part=(int(number), int(parts)),
    )
    if complete:
        print("\n".join(outcome(args.output, args.max_tokens)))
    else:
        print(f"part {args.part} is done; {args.output} is written by the last part to end")


def read(args: argparse.Namespace) -> list[Prompt]:
    """Read the prompts of the wanted domains, and say how many there are of each.

    Raises:
        UserError: a bad one, or there are none.
    """
    report = ReadReport()
    prompts = read_prompts(args.input, domain=args.domain, on_bad=args.on_bad_record, report=report)
    report.show()
    domains = Counter(prompt.domain for prompt in prompts)
    print(f"{len(prompts)} prompts: {', '.join(f'{n} {name}' for name, n in domains.items())}")
    if args.domains:
        prompts = [prompt for prompt in prompts if prompt.domain in args.domains]
    if not prompts:
        raise UserError(f"no prompt of {' '.join(args.input)} is left to sample for")
    return prompts


def check(
    args: argparse.Namespace, engine: Engine, chat: ChatTokenizer | None, prompts: list[Prompt]
) -> None:
    """Compare the engine's log-probs with the scorer's, and say what came of it.

    Raises:
        UserError: with --check-only, they differ or cannot be compared.
    """
    if not args.check:
        return
    coarse = args.bf16 or args.engine != "transformers"  # servers have bfloat16, mostly
    tolerance = args.check_tolerance or TOLERANCE[coarse]
    try:
        if chat is None:
            raise NotMeasuredError("no model's folder to score them with: give --check-model")
        try:
            scorer = open_scorer(
                args.check_model or args.model,
                engine,
                bf16=args.bf16,
                trust_remote_code=args.trust_remote_code,
            )
        except (UserError, torch.OutOfMemoryError) as error:
            raise NotMeasuredError(str(error)) from None
        found = check_engine(engine, prompts[: args.check], chat, scorer, args.seed)
        fine, said = found.agrees(tolerance), found.sentence(tolerance, chat.path)
    except NotMeasuredError as error:
        fine, said = False, f"the engine's log-probs are not checked: {error}"
    if args.check_only and not fine:
        raise UserError(said)
    print(said if fine else f"warning: {said}", file=sys.stdout if fine else sys.stderr)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, nargs="+", metavar="FILE[=COUNT]")
    parser.add_argument(
        "--on-bad-record", choices=ON_BAD, default="error",
        help="stop at the first malformed prompt, or leave such prompts out (default: error)",
    )  # fmt: skip
    parser.add_argument("--domain", help="of prompts that do not say theirs")
    parser.add_argument("--domains", nargs="+", help="sample only for these (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".jsonl")
    parser.add_argument("--model", required=True, help="Hugging Face folder; or a server's name")
    parser.add_argument("--name", help="of the model in the output (default: the folder's)")
    parser.add_argument(
        "--as", dest="preset", choices=PRESETS, default="source",
        help="8 responses for the pivot, 4 for a source (default: source)",
    )  # fmt: skip
    parser.add_argument("--count", type=positive, help="responses of a prompt, if not the preset's")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: 0.8)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--max-tokens", type=positive, default=2048, help="(default: 2048)")
    parser.add_argument(
        "--retries", type=count_of, default=2,
        help="times that a prompt is asked again in vain, where responses are cut, empty or fewer "
        "than asked for (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-cut", action="store_true",
        help="keep responses that end at --max-tokens, marked as such (default: left out)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--shard-prompts", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of the job (default: all)")
    parser.add_argument(
        "--engine", choices=("transformers", "vllm", "server"), default="transformers",
        help="(default: transformers)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, default=8, help="prompts at once, of transformers (default: 8)"
    )
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16, else float32")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="of vLLM")
    add_server_flags(parser)
    add_check_flags(parser)
    add_tokenizer_flags(parser, scored=False)
    args = parser.parse_args()
    if args.output is None and not args.check_only:
        parser.error("--output is missing: expected the file to write")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("expected --temperature from 0 on and --top-p above 0, up to 1")
    if args.check_only and not args.check:
        parser.error("--check-only and --check 0 exclude each other")
    return args


def count_of(text: str) -> int:
    """Read a whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of --engine server."""
    parser.add_argument("--server", metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--server-key-file", metavar="FILE", help="holds the server's key")
    parser.add_argument("--server-requests", type=positive, default=32, help="at once (default 32)")
    parser.add_argument("--server-timeout", type=float, default=600.0, help="s (default: 600)")
    parser.add_argument(
        "--server-retries", type=count_of, default=4, help="of a request that fails (default: 4)"
    )


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison with the scorer."""
    parser.add_argument(
        "--check", type=count_of, default=4, metavar="N",
        help="prompts for which the engine's log-probs are compared with the scorer's before "
        "anything else; 0: none (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--check-model", metavar="DIR",
        help="the model to compare a server with (default: --model, where that is a folder)",
    )  # fmt: skip
    parser.add_argument(
        "--check-tolerance", type=float, metavar="NATS",
        help="largest difference of a token, 20 times that of the mean (default: 1, of "
        "transformers in float32 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--check-only", action="store_true",
        help="compare, and sample nothing; exit code 2 where they differ",
    )  # fmt: skip


def open_engine(args: argparse.Namespace, how: Sampling) -> tuple[Engine, ChatTokenizer | None]:
    """Load the model and its tokenizer, or check that there is a server.

    Returns:
        The engine, and the tokenizer; None where only a server knows it.

    Raises:
        UserError: an engine that is not there, or flags that have no effect.
    """
    args.template_options = read_options(args.chat_template_options)
    if (args.engine == "server") != (args.server is not None):
        raise UserError("--engine server and --server URL go together: give both or none")
    if args.server and not args.server.startswith(("http://", "https://")):
        raise UserError(f"--server is {args.server}, expected such as http://localhost:8000/v1")
    folder = args.check_model or args.model
    if args.engine != "server" and args.check_model:
        raise UserError("--check-model is for --engine server: others have the model itself")
    if args.engine != "server" or args.check_model:
        check_folder(folder)
    if args.engine != "server":
        chat = open_tokenizer(args.model, args)
        make = VllmEngine if args.engine == "vllm" else TransformersEngine
        return make(args.model, chat, how, args), chat
    known = args.check_model or (Path(folder) / "config.json").is_file()
    if args.chat_template and not known:
        raise UserError("--chat-template has no effect: the server has the template")
    return ServerEngine(args.model, how, args), open_tokenizer(folder, args) if known else None


if __name__ == "__main__":
    run(main)
