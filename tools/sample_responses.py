#!/usr/bin/env python
"""Sample responses of a model to prompts: the first step from prompts to preference pairs.

    python tools/sample_responses.py --model models/phi-4 --as pivot --engine vllm --bf16 \\
        --input infinity.jsonl=60000 numina.parquet=45000 kodcode.parquet=45000 --output phi-4.jsonl
    python tools/sample_responses.py --model models/coder --as source --domains code ...

Prompts are read from this program's records and Infinity-Instruct, NuminaMath-1.5 and KodCode as
they are published; FILE=COUNT takes so many. `--as` presets what the paper did: 8 responses of the
pivot, 4 of each source, at temperature 0.8. Finished shards are kept: run an interrupted command
again. Several processes or array tasks share a job with --part 0/4, 1/4, ...
"""

import argparse
from pathlib import Path

from megatron_infifpo.cli import UserError, positive, run
from megatron_infifpo.data.flags import add_tokenizer_flags, open_tokenizer, report_skipped
from megatron_infifpo.data.records import ON_BAD
from megatron_infifpo.responses.engines import (
    Engine,
    Sampling,
    server_engine,
    transformers_engine,
    vllm_engine,
)
from megatron_infifpo.responses.prompts import read_prompts
from megatron_infifpo.responses.sampling import run_job

PRESETS = {"pivot": 8, "source": 4}


def main() -> None:
    """Parse the command line and sample."""
    args = parse()
    skipped: list[str] | None = [] if args.on_bad_record == "skip" else None
    prompts = read_prompts(args.input, domain=args.domain, skipped=skipped)
    report_skipped(skipped or [])
    if args.domains:
        prompts = [prompt for prompt in prompts if prompt.domain in args.domains]
    if not prompts:
        raise UserError(f"no prompt of {' '.join(args.input)} is left to sample for")
    number, _, parts = args.part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise UserError(f"--part is {args.part}, expected I/N with I from 0 to N - 1")
    if args.output.exists():
        if int(parts) > 1:  # another part has joined it
            print(f"{args.output} is complete already")
            return
        raise UserError(f"{args.output} exists: delete it or choose another name")
    count = args.count or PRESETS[args.preset]
    how = Sampling(count, args.temperature, args.top_p, args.max_tokens, args.seed)
    model = args.name or Path(args.model).resolve().name
    plan = {"model": model, "engine": args.engine, "bf16": args.bf16, "batch": args.batch}
    plan |= {"chat_template": args.chat_template, **vars(how)}
    complete = run_job(
        prompts,
        open_engine(args, how),
        args.output,
        plan,
        shard_prompts=args.shard_prompts,
        part=(int(number), int(parts)),
    )
    if complete:
        print(f"{args.output}: {len(prompts)} prompts, {count} responses each, of {model}")
    else:
        print(f"part {args.part} is done; {args.output} is written by the last part to end")


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
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=".jsonl")
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
    parser.add_argument("--server", metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--server-key-file", metavar="FILE", help="holds the server's key")
    parser.add_argument("--server-requests", type=positive, default=32, help="at once (default 32)")
    parser.add_argument("--server-timeout", type=float, default=600.0, help="s (default: 600)")
    parser.add_argument("--server-retries", type=int, default=4, help="(default: 4)")
    add_tokenizer_flags(parser)
    return parser.parse_args()


def open_engine(args: argparse.Namespace, how: Sampling) -> Engine:
    """Load the model, or check that there is a server.

    Raises:
        UserError: an engine that is not there, or flags that have no effect.
    """
    if (args.engine == "server") != (args.server is not None):
        raise UserError("--engine server and --server URL go together: give both or none")
    if args.engine == "server":
        return server_engine(args.model, how, args)
    chat = open_tokenizer(args.model, args)
    make = vllm_engine if args.engine == "vllm" else transformers_engine
    return make(args.model, chat, how, args)


if __name__ == "__main__":
    run(main)
