"""Score preference records under one model: shard, run, resume, merge."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_infifpo import __version__
from megatron_infifpo.convert.block_fp8 import scored_config
from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.patches import cpu
from megatron_infifpo.ranks import rank
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import (
    canonical_bytes,
    iter_records,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.prefetch import prefetch
from megatron_infifpo.scoring.agreement import check_agreement
from megatron_infifpo.scoring.job import BACKENDS, ScoringJob, ScoringModel
from megatron_infifpo.scoring.merge import merge
from megatron_infifpo.scoring.ranks import Progress, on_first_rank
from megatron_infifpo.scoring.rows import Limits, ShardRows, prepare_shard
from megatron_infifpo.scoring.shards import read_records, write_shard
from megatron_infifpo.scoring.size import EvenSample, scored_tokens, size_line
from megatron_infifpo.scoring.top_k import TopKeeper, check_top_k, top_k_fields
from megatron_infifpo.storage.sharded_job import ShardedJob, accept_finished
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_infifpo.tokens.options import open_tokenizer
from megatron_infifpo.tokens.tokenization import ChatTokenizer

_UNUSUAL = ("context_parallel", "expert_parallel", "expert_tensor_parallel", "max_row_tokens")
MAY_MOVE = ("path",)  # in a plan: the same tokenizer may lie elsewhere now


def score(job: ScoringJob) -> None:
    """Score every response of the records, into a log-prob dataset; alone or on many ranks.

    Finished shards are kept: an interrupted job goes on where it was, on any number of ranks.
    Output that is complete already is left as it is. Prints a progress bar and a summary.

    Args:
        job: what is scored; all ranks have the same. `LogprobStore(job.output)` opens the result.

    Raises:
        UserError: bad records, an unusable model or layout, or output of another job.
    """
    tokenizer = _open_tokenizer(job)
    limits = _limits(job)
    shards = ShardedJob(job.output, ".npz", free=MAY_MOVE)
    if Path(f"{job.output}.json").exists():
        if rank() == 0:
            _check_finished(job, _plan(job, tokenizer, limits, _scan(job, limits)))
            shards.remove()  # a job may be killed when all but this is done
        return
    # Found out before a large model is loaded, and by one rank only.
    scanned = {}
    if rank() == 0:
        _check_writable(shards.folder)
        sample = EvenSample()
        scanned = _scan(job, limits, sample)
        _say_size(job, tokenizer, limits, scanned, sample)
    model = job.load_model(limits.context_length)

    def start() -> tuple[dict[str, Any], list[int]]:
        plan = _plan(job, tokenizer, limits, scanned)
        plan |= {"device": _device(), "share_prompt": model.layout.share_prompt} | model.facts
        shards.claim(plan)
        return plan, shards.missing(-(-plan["count"] // job.shard_records))

    # All ranks must agree on what is finished, whatever view of the folder each of them has.
    plan, todo = on_first_rank(start)
    if todo and job.compared:  # a backend that is compared is one process
        check_agreement(job, tokenizer, limits, model)
    mine = todo[model.data_parallel_rank :: model.data_parallel_size]
    total, size = plan["count"], job.shard_records
    finished = total - sum(min(size, total - s * size) for s in todo)
    title = f"score {plan['model']}"
    with Progress(title, total, finished, shards=len(todo), counts=model.is_writer) as progress:
        for shard in prefetch(_rows(job, tokenizer, limits, model, set(mine))):
            _score_shard(shard, shards, model, progress)
        progress.wait()
    on_first_rank(lambda: merge(job, shards, tokenizer, limits, plan))


def _open_tokenizer(job: ScoringJob) -> ChatTokenizer:
    """Load the model's tokenizer; another one must not pass for it."""
    carried = Path(job.model) / "hf"
    own = carried if carried.is_dir() else Path(job.model)
    if job.tokenizer is None:
        return open_tokenizer(own, job.tokenizer_options)
    tokenizer = open_tokenizer(job.tokenizer, job.tokenizer_options)
    if any(own.glob("tokenizer*")):
        found = load_tokenizer(own, trust_remote_code=job.tokenizer_options.trust_remote_code)
        if tokenizer_fingerprint(found) != tokenizer.fingerprint()["tokenizer_sha256"]:
            raise UserError(
                f"--tokenizer {job.tokenizer} is another tokenizer than the model's own in "
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


def _limits(job: ScoringJob) -> Limits:
    """Read the model's context from its config.json, and check the flags against it."""
    if job.backend == "megatron":
        text = megatron_args(scored_config(job.model))
    else:
        config = read_hf_config(job.model)
        text = config.get("text_config", config)
    context = text.get("max_position_embeddings")
    spare = BACKENDS[job.backend].spare
    most = None if context is None else int(context) - spare
    length = job.context_length or most
    if length is None:
        raise UserError(
            f"{job.model}/config.json has no max_position_embeddings; say with --context-length "
            "how many tokens the model takes"
        )
    if most is not None and length > most:
        less = f" less {spare}, which {job.backend} needs" if spare else ""
        raise UserError(
            f"--context-length is {length}, but {job.model} takes {most} tokens "
            f"(max_position_embeddings{less})"
        )
    return Limits(length, job.over_context == "cut", job.domains)


def _say_size(
    job: ScoringJob,
    tokenizer: ChatTokenizer,
    limits: Limits,
    scanned: dict[str, Any],
    sample: EvenSample,
) -> None:
    """Check `--top-k`, and print how large it will be; nothing without it."""
    if job.top_k is not None:
        names = scanned["responses"]
        check_top_k(job, tokenizer, names)
        tokens = scored_tokens(sample.records, tokenizer, limits, len(names))
        print(size_line(job, names, scanned["count"], tokens), flush=True)


def _scan(job: ScoringJob, limits: Limits, sample: EvenSample | None = None) -> dict[str, Any]:
    """Read all records once: are they well-formed, how many, which."""
    report = ReadReport()
    digest, count, domains = hashlib.sha256(), 0, set()
    names: tuple[str, ...] = ()
    on_bad, lists = job.on_bad_record, job.lists
    for record in iter_records(job.input, on_bad=on_bad, lists=lists, report=report):
        digest.update(canonical_bytes(record))
        domains.add(record.domain)
        if sample is not None:
            sample.add(record)
        count += 1
        names = max(names, record.names, key=len)
    report.show()
    if not count:
        raise UserError(f"there are no records in {', '.join(job.input)}, expected at least one")
    for domain in limits.domains or ():
        if domain not in domains and job.absent_domains == "error":
            raise UserError(
                f"--domains names {domain!r}, expected some of {', '.join(sorted(domains))}; "
                "--absent-domains mask takes domains without a record"
            )
    return {
        "count": count,
        "records_sha256": digest.hexdigest(),
        "responses": list(names),
    }


def _plan(
    job: ScoringJob, tokenizer: ChatTokenizer, limits: Limits, scanned: dict[str, Any]
) -> dict[str, Any]:
    """All that a job's numbers depend on."""
    return {
        **scanned,
        "model": job.model_name,
        "weights_sha256": weights_fingerprint(job.model),
        "tokenizer": tokenizer.describe(),
        "backend": job.backend,
        "dtype": "bfloat16" if job.bf16 else "float32",
        "tensor_parallel": job.tensor_model_parallel_size,
        "pipeline_parallel": job.pipeline_model_parallel_size,
        "context_length": limits.context_length,
        "over_context": job.over_context,
        "domains": job.domains and list(job.domains),
        "shard_records": job.shard_records,
        "row_tokens": job.micro_batch_tokens,
        **_unless_usual(job),
        **top_k_fields(job, tokenizer),
        "versions": {
            "megatron_infifpo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _unless_usual(job: ScoringJob) -> dict[str, int]:
    """What a plan says of flags that jobs had not at first, and that few have."""
    values = (
        job.context_parallel_size,
        job.expert_model_parallel_size,
        job.expert_tensor_parallel_size,
        job.max_row_tokens,
    )
    named = zip(_UNUSUAL, values, strict=True)
    return {name: value for name, value in named if value not in (None, 1)}


def _check_finished(job: ScoringJob, plan: dict[str, Any]) -> None:
    """Accept output that this very job has written, and refuse any other."""
    store, unusual = LogprobStore(job.output), dict.fromkeys(_UNUSUAL)
    accept_finished(job.output, unusual | plan, store.manifest, store.open_all, MAY_MOVE)


def _rows(
    job: ScoringJob,
    tokenizer: ChatTokenizer,
    limits: Limits,
    model: ScoringModel,
    wanted: set[int],
) -> Iterator[ShardRows]:
    """Read and pack this rank's shards, one after the other."""
    keeper = TopKeeper.of(job, tokenizer)
    for number, records in read_records(job, wanted):
        yield prepare_shard(
            number,
            records,
            tokenizer,
            limits,
            vocab_size=model.vocab_size,
            row_tokens=job.micro_batch_tokens,
            max_row_tokens=job.max_row_tokens,
            layout=model.layout,
            keeper=keeper,
        )


def _score_shard(
    shard: ShardRows, shards: ShardedJob, model: ScoringModel, progress: Progress
) -> None:
    """Score one shard and write it, from the rank that holds the results."""
    masked = len(shard.records) - len({i for row in shard.plan for i in row})
    progress.add(masked, 0)
    ranks = model.layout.context_parallel

    def done(row: Row) -> None:
        # A record counts with its first response; a rank has its part of the tokens.
        progress.add(int(row["valid"][:, 0].sum()), ranks * row["tokens"].numel())

    # The schedules of Megatron cannot run no row at all: every record may be masked.
    outputs: Sequence[Any] = model(shard.rows, done) if shard.rows else []
    if model.is_writer:
        said = list(zip(shard.notes, shard.remarks, strict=True))
        top = shard.unpack_top(outputs) if shard.keeper else None
        with shards.writing(shard.number) as file:
            write_shard(file, shard.records, said, shard.unpack(outputs), top)
        progress.wrote()
