"""Score every response of preference records under one model, into a log-prob dataset.

The model speaks its own language: its tokenizer, its chat template. Run it alone or on many ranks;
rerun the same command after an interruption, on any number of ranks, and finished shards are kept.

    infifpo score --backend transformers --model qwen2.5-14b-instruct \\
        --input train.jsonl --output logprobs/qwen

    torchrun --nproc-per-node 8 -m megatron_infifpo score --backend megatron --model pivot \\
        --tensor-model-parallel-size 2 --bf16 --input train.jsonl --output logprobs/pivot

With --backend vllm the model is vLLM's, in this process (with --tensor-model-parallel-size) or on a
server; it is asked for the log-probs of a prompt's tokens.

With --top-k the most probable tokens are kept at each scored one, for token-level fusion.
"""

import argparse

from megatron_infifpo.commands.flags import (
    add_expert_flags,
    add_record_flags,
    add_server_flags,
    add_tokenizer_flags,
    fields_of,
    hidden_alias,
    take_defaults,
    tokenizer_options,
)
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.scoring.client import ServerAddress
from megatron_infifpo.scoring.job import (
    ABSENT,
    BACKENDS,
    COMPARE_RECORDS,
    OVER_CONTEXT,
    TOP_K_RESPONSES,
    ScoringJob,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a scoring job."""
    parser.add_argument(
        "--backend",
        choices=list(BACKENDS),
        required=True,
        help="megatron: tensor and pipeline parallel, packed rows; transformers: any causal LM; "
        "vllm: what vLLM runs, in this process or on a --server",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face folder or (megatron) converted checkpoint",
    )
    add_record_flags(parser)
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="of the log-prob dataset to write"
    )
    parser.add_argument("--name", help="the model's name in the manifest (default: its folder)")
    add_layout_flags(parser)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--domains",
        nargs="+",
        metavar="DOMAIN",
        help="score records of these domains only and mask the others (default: all)",
    )
    what.add_argument(
        "--absent-domains",
        choices=ABSENT,
        help="where no record is of a domain that --domains names, a mistake or data of which all "
        "others are masked (default: %(default)s)",
    )
    what.add_argument(
        "--context-length",
        type=positive,
        metavar="N",
        help="tokens of a prompt with one response (default, and at most: the model's context)",
    )
    what.add_argument(
        "--over-context",
        choices=OVER_CONTEXT,
        help="a record with a longer response is masked, or its responses are cut, which the "
        "manifest notes (default: %(default)s)",
    )
    add_top_k_flags(what)
    what.add_argument(
        "--tokenizer", metavar="DIR", help="for a model folder without one (default: the model's)"
    )
    add_tokenizer_flags(what)
    add_vllm_flags(parser)
    add_work_flags(parser)
    for job in (ServerAddress, ScoringJob):
        take_defaults(parser, job)


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how ranks share the model, and its weights' type."""
    for kind in ("tensor-model", "pipeline-model"):
        parser.add_argument(f"--{kind}-parallel-size", type=positive, metavar="N")
    parser.add_argument(
        "--context-parallel-size", type=positive, metavar="N",
        help="ranks that share the tokens of a text, with --backend megatron: for long ones",
    )  # fmt: skip
    add_expert_flags(parser)
    parser.add_argument(
        "--bf16", action="store_true", help="weights in bfloat16 (default: float32)"
    )


def add_top_k_flags(what: argparse._ArgumentGroup) -> None:
    """Add the flags of the most probable tokens."""
    what.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="keep the K most probable tokens at each scored one, for infifpo fuse-targets; 16 is "
        "usual, and takes 104 bytes a token (default: none)",
    )
    what.add_argument(
        "--top-k-responses",
        choices=TOP_K_RESPONSES,
        help="of which responses: token-level fusion trains on the chosen ones of pairs "
        "(default: %(default)s)",
    )


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of --backend vllm."""
    group = parser.add_argument_group("--backend vllm")
    add_server_flags(group)
    group.add_argument(
        "--server-model", metavar="NAME", help="of the model on the server (default: its only one)"
    )
    group.add_argument(
        "--compare-records",
        type=whole(0),
        metavar="N",
        help="records that are scored by transformers, too, before all others; a difference is an "
        f"error; 0: none (default: {COMPARE_RECORDS})",
    )


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the work is divided."""
    work = parser.add_argument_group("how the work is divided")
    work.add_argument(
        "--micro-batch-tokens",
        type=positive,
        metavar="N",
        help="tokens of a packed row (default: %(default)s)",
    )
    hidden_alias(parser, "--row-tokens", "--micro-batch-tokens")
    work.add_argument(
        "--max-row-tokens",
        type=positive,
        metavar="N",
        help="the same, and a record whose responses have more together, with their prompt, is "
        "scored response by response: less memory for long texts, and the prompt is computed again "
        "(default: records stay whole)",
    )
    work.add_argument(
        "--shard-records",
        type=positive,
        metavar="N",
        help="records of a shard, the unit of work and of resuming (default: %(default)s)",
    )


def job_of(args: argparse.Namespace) -> ScoringJob:
    """Return what is scored, and how."""
    given = {
        "server": args.server and ServerAddress(**fields_of(args, ServerAddress)),
        "tokenizer_options": tokenizer_options(args),
    }
    return ScoringJob(**fields_of(args, ScoringJob) | given)


def run(args: argparse.Namespace) -> None:
    """Score."""
    job = job_of(args)
    from megatron_infifpo.scoring.score import score

    score(job)
