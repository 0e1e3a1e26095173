"""Score preference records under one model: shard, run, resume, merge."""

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_infifpo import __version__
from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.patches import cpu
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import (
    RESPONSES,
    canonical_bytes,
    iter_records,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.rows.prefetch import prefetch
from megatron_infifpo.scoring.merge import merge
from megatron_infifpo.scoring.ranks import Progress, on_first_rank, rank
from megatron_infifpo.scoring.rows import Limits, ShardRows, prepare_shard
from megatron_infifpo.scoring.shards import ShardFolder, different, read_shards
from megatron_infifpo.tokens.flags import open_tokenizer
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_infifpo.tokens.tokenization import ChatTokenizer


def _megatron(directory: str, **options: Any) -> Any:
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    if options.pop("trust_remote_code"):
        raise UserError(
            "--trust-remote-code has no effect with --backend megatron, which runs its own model"
        )
    return MegatronBackend(directory, **options)


def _transformers(directory: str, **options: Any) -> Any:
    from megatron_infifpo.scoring.transformers_backend import TransformersBackend

    return TransformersBackend(directory, **options)


# A backend holds this rank's part of a model; called with collated rows it returns their log-probs.
BACKENDS = {"megatron": _megatron, "transformers": _transformers}


def score(args: argparse.Namespace) -> None:
    """Run one scoring job, as `tools/score_source.py` describes its arguments.

    Raises:
        UserError: bad records, an unusable model or layout, or output of another job.
    """
    tokenizer = _open_tokenizer(args)
    limits = _limits(args)
    folder = ShardFolder(Path(f"{args.output}.shards"))
    if Path(f"{args.output}.json").exists():
        if rank() == 0:
            _check_finished(args, _plan(args, tokenizer, limits, _scan(args, limits)))
            folder.remove()  # a job may be killed when all but this is done
        return
    # Found out before a large model is loaded, and by one rank only.
    scanned = {}
    if rank() == 0:
        _check_writable(folder.folder)
        scanned = _scan(args, limits)
    backend = BACKENDS[args.backend](
        args.model,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        bf16=args.bf16,
        trust_remote_code=args.trust_remote_code,
    )

    def start() -> tuple[dict[str, Any], list[int]]:
        plan = _plan(args, tokenizer, limits, scanned)
        plan |= {"device": _device(), "share_prompt": backend.shares_prompts}
        folder.open(plan)
        shards = range(-(-plan["count"] // args.shard_records))
        return plan, [s for s in shards if not folder.is_finished(s)]

    # All ranks must agree on what is finished, whatever view of the folder each of them has.
    plan, todo = on_first_rank(start)
    mine = todo[backend.data_parallel_rank :: backend.data_parallel_size]
    total, size = plan["count"], args.shard_records
    finished = total - sum(min(size, total - s * size) for s in todo)
    title = f"score {plan['model']}"
    with Progress(title, total, finished, shards=len(todo), counts=backend.is_writer) as progress:
        for shard in prefetch(_shards(args, tokenizer, limits, backend, set(mine))):
            _score_shard(shard, folder, backend, progress)
        progress.wait()
    on_first_rank(lambda: merge(args, folder, tokenizer, limits, plan))


def _open_tokenizer(args: argparse.Namespace) -> ChatTokenizer:
    """Load the model's tokenizer; another one must not pass for it."""
    carried = Path(args.model) / "hf"
    own = carried if carried.is_dir() else Path(args.model)
    if args.tokenizer is None:
        return open_tokenizer(own, args)
    tokenizer = open_tokenizer(args.tokenizer, args)
    if any(own.glob("tokenizer*")):
        found = load_tokenizer(own, trust_remote_code=args.trust_remote_code)
        if tokenizer_fingerprint(found) != tokenizer.fingerprint()["tokenizer_sha256"]:
            raise UserError(
                f"--tokenizer {args.tokenizer} is another tokenizer than the model's own in "
                f"{own}; leave the flag out"
            )
    return tokenizer


def _check_writable(folder: Path) -> None:
    """Check that the folder of the shards is there, or can be made."""
    place = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"cannot write to {place}, expected a folder to write --output into")


def _device() -> str:
    """Name what computes: numbers of different devices are not the same to the last bit."""
    if cpu.is_enabled() or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name()


def _limits(args: argparse.Namespace) -> Limits:
    """Read the model's context from its config.json, and check the flags against it."""
    config = read_hf_config(args.model)
    context = config.get("text_config", config).get("max_position_embeddings")
    if context is None and args.context_length is None:
        raise UserError(
            f"{args.model}/config.json has no max_position_embeddings; say with --context-length "
            "how many tokens the model takes"
        )
    if context is not None and args.context_length is not None and args.context_length > context:
        raise UserError(
            f"--context-length is {args.context_length}, but {args.model} takes {context} tokens "
            "(max_position_embeddings)"
        )
    return Limits(args.context_length or context, args.over_context == "cut", args.domains)


def _scan(args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Read all records once: are they well-formed, how many, which."""
    report = ReadReport()
    digest, count, domains, responses = hashlib.sha256(), 0, set(), 0
    for record in iter_records(args.input, on_bad=args.on_bad_record, report=report):
        digest.update(canonical_bytes(record))
        domains.add(record.domain)
        count, responses = count + 1, len(record.responses)
    report.show()
    if not count:
        raise UserError(f"there are no records in {', '.join(args.input)}, expected at least one")
    for domain in limits.domains or ():
        if domain not in domains:
            raise UserError(
                f"--domains names {domain!r}, expected some of {', '.join(sorted(domains))}"
            )
    return {
        "count": count,
        "records_sha256": digest.hexdigest(),
        "responses": list(RESPONSES[:responses]),
    }


def _plan(
    args: argparse.Namespace, tokenizer: ChatTokenizer, limits: Limits, scanned: dict[str, Any]
) -> dict[str, Any]:
    """All that a job's numbers depend on."""
    return {
        **scanned,
        "model": args.name or Path(args.model).resolve().name,
        "weights_sha256": weights_fingerprint(args.model),
        "tokenizer": tokenizer.describe(),
        "backend": args.backend,
        "dtype": "bfloat16" if args.bf16 else "float32",
        "tensor_parallel": args.tensor_model_parallel_size,
        "pipeline_parallel": args.pipeline_model_parallel_size,
        "context_length": limits.context_length,
        "over_context": args.over_context,
        "domains": args.domains,
        "shard_records": args.shard_records,
        "row_tokens": args.row_tokens,
        "versions": {
            "megatron_infifpo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _check_finished(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Accept output that this very job has written, and refuse any other."""
    found = LogprobStore(args.output).manifest
    if difference := different(plan, {name: found.get(name) for name in plan}):
        raise UserError(
            f"{args.output}.json exists and is of another job: {difference}; delete it or choose "
            "another --output"
        )
    LogprobStore(args.output).logprobs(0, 0)  # opens every file
    print(f"{args.output} is complete already")


def _shards(
    args: argparse.Namespace,
    tokenizer: ChatTokenizer,
    limits: Limits,
    backend: Any,
    wanted: set[int],
) -> Iterator[ShardRows]:
    """Read and pack this rank's shards, one after the other."""
    for number, records in read_shards(
        args.input, args.shard_records, wanted, on_bad=args.on_bad_record
    ):
        yield prepare_shard(
            number,
            records,
            tokenizer,
            limits,
            vocab_size=backend.vocab_size,
            row_tokens=args.row_tokens,
            pad_multiple=backend.pad_multiple,
            share_prompt=backend.shares_prompts,
        )


def _score_shard(shard: ShardRows, folder: ShardFolder, backend: Any, progress: Progress) -> None:
    """Score one shard and write it, from the rank that holds the results."""
    masked = len(shard.records) - sum(len(row) for row in shard.plan)
    progress.add(masked, 0)
    # The schedules of Megatron cannot run no row at all: every record may be masked.
    outputs = []
    if shard.rows:
        outputs = backend(
            shard.rows, lambda row: progress.add(len(row["indices"]), row["tokens"].numel())
        )
    if backend.is_writer:
        said = list(zip(shard.notes, shard.remarks, strict=True))
        folder.write(shard.number, shard.records, said, shard.unpack(outputs))
        progress.wrote()
