"""Sample responses of a model to prompts: the first step from prompts to preference pairs.

    infifpo sample --model models/phi-4 --as pivot --engine vllm --bf16 \\
        --input infinity.jsonl=60000 numina.parquet=45000 kodcode.parquet=45000 --output phi-4.jsonl
    infifpo sample --model models/coder --as source --domains code ...

Prompts are read from this program's records, preference records, conversations, and
Infinity-Instruct, NuminaMath-1.5 and KodCode as they are published; FILE=COUNT takes so many.
`--as` presets what the paper did: 8 responses of the pivot, 4 of each source, at temperature 0.8.
Responses that are cut at --max-tokens or empty are left out and asked for again; reasoning is kept
apart from the answer. First, the engine's log-probs of a few responses are compared with the
scorer's. Finished shards are kept: run an interrupted command again. Several processes or array
tasks share a job with --part 0/4, 1/4, ... Samples of the policy itself, for a policy gradient, are
those of --temperature 1 --keep-cut.
"""

import argparse

from megatron_infifpo.commands.flags import (
    add_server_flags,
    add_tokenizer_flags,
    fields_of,
    take_defaults,
    tokenizer_options,
)
from megatron_infifpo.commands.response_flags import add_engine_flags, add_response_flags
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.responses.engines import EngineOptions, Sampling
from megatron_infifpo.responses.sample import LOCAL, SamplingJob, sample
from megatron_infifpo.responses.sampling import outcome
from megatron_infifpo.responses.server import ServerOptions

PRESETS = {"pivot": 8, "source": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add prompts, the model, and how it is sampled from."""
    add_response_flags(
        parser,
        input_form="FILE[=COUNT]",
        bad="malformed prompt, or leave such prompts",
        bf16="weights in bfloat16, else float32",
        batch="prompts at once, of transformers",
        cut="keep responses that end at --max-tokens, marked as such",
        output_required=False,
    )
    parser.add_argument("--domain", help="of prompts that do not say theirs")
    parser.add_argument("--domains", nargs="+", help="sample only for these (default: all)")
    parser.add_argument("--model", required=True, help="Hugging Face folder; or a server's name")
    parser.add_argument("--name", help="of the model in the output (default: the folder's)")
    parser.add_argument(
        "--as", dest="preset", choices=PRESETS, default="source",
        help="8 responses for the pivot, 4 for a source (default: source)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="(default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="(default: %(default)g)")
    parser.add_argument("--max-tokens", type=positive, help="(default: %(default)s)")
    parser.add_argument(
        "--retries", type=whole(0),
        help="times that a prompt is asked again in vain, where responses are cut, empty or fewer "
        "than asked for (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="(default: %(default)s)")
    parser.add_argument("--shard-prompts", type=positive, help="(default: %(default)s)")
    add_engine_flags(parser, (*LOCAL, "server"))
    add_server_flags(parser)
    add_check_flags(parser)
    for job in (Sampling, EngineOptions, ServerOptions, SamplingJob):
        take_defaults(parser, job)
    parser.add_argument("--count", type=positive, help="responses of a prompt, if not the preset's")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of the job (default: all)")
    add_tokenizer_flags(parser, scored=False)


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison with the scorer."""
    parser.add_argument(
        "--check", type=whole(0), metavar="N",
        help="prompts for which the engine's log-probs are compared with the scorer's before "
        "anything else; those of an engine here are kept in OUTPUT.measured; 0: none "
        "(default: %(default)s)",
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


def job_of(args: argparse.Namespace) -> SamplingJob:
    """Return what is sampled from what.

    Raises:
        UserError: flags that do not fit.
    """
    count = args.count or PRESETS[args.preset]
    given = {
        "how": Sampling(**fields_of(args, Sampling) | {"count": count}),
        "options": EngineOptions(**fields_of(args, EngineOptions)),
        "server": args.server and ServerOptions(**fields_of(args, ServerOptions)),
        "tokenizer": tokenizer_options(args),
        "part": read_part(args.part),
    }
    return SamplingJob(**fields_of(args, SamplingJob) | given)


def run(args: argparse.Namespace) -> None:
    """Sample, and say what came of it.

    Raises:
        UserError: flags that do not fit, or what `sample` refuses.
    """
    job = job_of(args)
    if args.count and job.sampling.count < args.count:
        print("temperature 0: one response of a prompt, all others would be the same")
    done = args.output is not None and args.output.exists()
    complete = sample(job)
    if complete and done:
        print(f"{args.output} is complete already")
    elif complete:
        print("\n".join(outcome(args.output, args.max_tokens)))
    elif not args.check_only:
        print(f"part {args.part} is done; {args.output} is written by the last part to end")


def read_part(text: str) -> tuple[int, int]:
    """Read --part.

    Raises:
        UserError: it is not I/N.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise UserError(f"--part is {text}, expected I/N with I from 0 to N - 1")
    return int(number), int(parts)
