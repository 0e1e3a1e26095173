"""Score preference records under one model: shard, run, resume, merge."""

import argparse
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from megatron_infifpo import __version__
from megatron_infifpo.checkpoint.fingerprint import weights_fingerprint
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.batching import collate
from megatron_infifpo.data.logprob_store import LogprobWriter
from megatron_infifpo.data.preference_dataset import PreferencePair
from megatron_infifpo.data.records import (
    RESPONSES,
    PreferenceRecord,
    read_records,
    records_fingerprint,
)
from megatron_infifpo.data.tokenization import ChatTokenizer, TokenizedRecord
from megatron_infifpo.scoring.shards import ShardFolder, plan_rows
from megatron_infifpo.scoring.summary import print_summary


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
    if Path(f"{args.output}.json").exists():
        raise UserError(f"{args.output}.json exists: delete it or choose another --output")
    records = read_records(args.input, on_bad=args.on_bad_record)
    carried = Path(args.model) / "hf"
    tokenizer = ChatTokenizer.from_pretrained(
        carried if carried.is_dir() else Path(args.model), trust_remote_code=args.trust_remote_code
    )
    backend = BACKENDS[args.backend](
        args.model,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        bf16=args.bf16,
        trust_remote_code=args.trust_remote_code,
    )
    manifest = {
        "model": args.name or Path(args.model).resolve().name,
        "weights_sha256": _on_first_rank(lambda: weights_fingerprint(args.model)),
        **tokenizer.fingerprint(),
        "records_sha256": records_fingerprint(records),
        "backend": backend.name,
        "dtype": "bfloat16" if args.bf16 else "float32",
        "tensor_parallel": args.tensor_model_parallel_size,
        "pipeline_parallel": args.pipeline_model_parallel_size,
        "context_length": backend.context_length,
        "shard_records": args.shard_records,
        "row_tokens": args.row_tokens,
        "versions": {
            "megatron_infifpo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    folder = ShardFolder(Path(f"{args.output}.shards"), manifest)
    shards = [
        records[i : i + args.shard_records] for i in range(0, len(records), args.shard_records)
    ]
    # All ranks must agree on what is finished, whatever view of the folder each of them has.
    todo = _on_first_rank(lambda: [s for s in range(len(shards)) if not folder.is_finished(s)])
    mine = todo[backend.data_parallel_rank :: backend.data_parallel_size]
    for shard in _progress(mine, manifest["model"], len(shards) - len(todo)):
        _score_shard(shards[shard], shard, folder, tokenizer, backend, args.row_tokens)
    _barrier()
    if _rank() == 0:
        _merge(records, len(shards), folder, manifest, args.output)
    _barrier()


def _score_shard(
    records: list[PreferenceRecord],
    shard: int,
    folder: ShardFolder,
    tokenizer: ChatTokenizer,
    backend: Any,
    row_tokens: int,
) -> None:
    """Score one shard and write it, from the rank that holds the results."""
    tokenized = [tokenizer.encode(record) for record in records]
    lengths = np.array([_packed_length(t, backend.context_length) for t in tokenized])
    plan = plan_rows(lengths, row_tokens)
    rows = [
        collate([_pair(i, tokenized[i]) for i in row], pad_multiple=backend.pad_multiple)
        for row in plan
    ]
    outputs = backend(rows) if rows else []  # every record may be masked
    if not backend.is_writer:
        return
    results: list[list[np.ndarray]] = [
        [np.zeros(0, np.float32) for _ in t.response_ids] for t in tokenized
    ]
    for indices, row, logprobs in zip(plan, rows, outputs, strict=True):
        counts = row["token_counts"].flatten().tolist()
        pieces = iter(
            logprobs.numpy().astype(np.float32).copy() for logprobs in logprobs.split(counts)
        )
        for index in indices:
            results[index] = [next(pieces) for _ in tokenized[index].response_ids]
    folder.write(shard, results)


def _packed_length(record: TokenizedRecord, context_length: int) -> int:
    """Tokens of a record's row, or 0 where a response does not fit the model's context."""
    prompt = len(record.prompt_ids)
    segments = [prompt + len(response) for response in record.response_ids]
    return sum(segments) if max(segments) <= context_length else 0


def _pair(index: int, record: TokenizedRecord) -> PreferencePair:
    return PreferencePair(index, record.prompt_ids, record.response_ids, domain_code=0)


def _merge(
    records: list[PreferenceRecord],
    shards: int,
    folder: ShardFolder,
    manifest: dict[str, Any],
    output: str,
) -> None:
    """Join the finished shards into the log-prob dataset and print what was scored."""
    names = [name for name in RESPONSES if getattr(records[0], name) is not None]
    reason = f"longer than the model's context of {manifest['context_length']} tokens"
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    scored = (record for shard in range(shards) for record in folder.read(shard, len(names)))
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = []
    with LogprobWriter(
        output, responses=names, manifest={**manifest, "created": created}
    ) as writer:
        for record, values in zip(records, scored, strict=True):
            masked = not any(len(v) for v in values)
            writer.add(record.id, None if masked else values, reason=reason if masked else None)
            rows.append(None if masked else [(float(v.sum()), len(v)) for v in values])
    folder.remove()
    print_summary(manifest["model"], records, rows, output)


def _progress(mine: list[int], name: str, finished: int) -> Iterator[int]:
    """Iterate over this rank's shards; rank 0 shows a bar."""
    if finished and _rank() == 0:
        print(f"{finished} shards are finished already and kept")
    yield from tqdm(mine, desc=f"score {name}", unit="shard", disable=_rank() != 0)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _on_first_rank(function: Any) -> Any:
    """Compute something on rank 0 and give it to all."""
    value = [function() if _rank() == 0 else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(value, src=0)
    return value[0]
