"""Join the finished shards of a scoring job into its log-prob dataset."""

from array import array
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.references.logprob_store import MADE_BY, LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.summary import print_summary
from megatron_infifpo.references.top_k import covered_mass
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.scoring.rows import Limits
from megatron_infifpo.scoring.shards import read_records, read_shard
from megatron_infifpo.storage.notes import counted
from megatron_infifpo.storage.sharded_job import ShardedJob
from megatron_infifpo.tokens.tokenization import ChatTokenizer


def merge(
    job: ScoringJob,
    shards: ShardedJob,
    tokenizer: ChatTokenizer,
    limits: Limits,
    plan: dict[str, Any],
) -> None:
    """Join the finished shards into the log-prob dataset and print what was scored.

    Raises:
        UserError: a shard is damaged, the records have changed, or none of them was scored.
    """
    fields = {**plan, "made_by": MADE_BY, "source_files": list(job.input), "example": None}
    count = -(-plan["count"] // job.shard_records)
    domains: list[str] = []
    covered = array("d")
    bar = tqdm(desc="merge", total=plan["count"], unit=" records")
    responses, top_k = plan["responses"], plan.get("top_k")
    writer = LogprobWriter(job.output, responses=responses, manifest=fields, top_k=top_k)
    with bar, writer:
        numbered = read_records(job, set(range(count)))
        for (number, records), file in zip(numbered, shards.files(count), strict=True):
            for record, (note, remarks), values, top in read_shard(
                file, number, records, job.top_k
            ):
                domains.append(record.domain)
                covered.extend(covered_mass(top))
                if not any(map(len, values)):
                    writer.mask(record.id, note or "")
                    continue
                writer.add(record.id, values, note=note, remarks=remarks, top=top)
                if writer.fields["example"] is None:
                    writer.fields["example"] = _example(record, tokenizer, limits)
            bar.update(len(records))
        if len(writer) != plan["count"]:
            raise UserError(
                f"{', '.join(job.input)}: there are {len(writer)} records now, expected the "
                f"{plan['count']} of before; they have changed while they were scored"
            )
        # Data may have none of the domains where the job says so; what else masks all is a mistake.
        may_be_none = job.absent_domains == "mask" and [*writer.notes.counts()] == [limits.outside]
        if writer.fields["example"] is None and not may_be_none:
            raise UserError(
                f"no record can be scored: {counted(writer.notes.counts())}; choose another "
                "--context-length, or another source"
            )
    store = LogprobStore(job.output)
    store.open_all()
    shards.remove()
    print_summary(store, domains, np.array(covered).reshape(-1, 2))


def _example(record: PreferenceRecord, tokenizer: ChatTokenizer, limits: Limits) -> dict[str, str]:
    """Decode what was scored of a record, for people to check."""
    tokens, decode = limits.apply(tokenizer.encode(record))[0], tokenizer.tokenizer.decode
    assert tokens is not None, f"record {record.id!r} was scored"
    first = record.names[0]
    example = {
        "id": record.id,
        "prompt": decode(tokens.prompt_ids.tolist()),
        first: decode(tokens.response_ids[0].tolist()),
    }
    if tokens.scored is not None:
        example[f"{first}_not_scored"] = decode(tokens.response_ids[0][~tokens.scored[0]].tolist())
    return example
