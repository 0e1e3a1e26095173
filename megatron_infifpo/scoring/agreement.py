"""How far log-probs of two programs may differ, and whether a backend's do from transformers'."""

from pathlib import Path

import torch

from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from megatron_infifpo.records.records import iter_records
from megatron_infifpo.scoring.job import ScoringJob, ScoringModel
from megatron_infifpo.scoring.rows import Limits, ShardRows, prepare_shard
from megatron_infifpo.scoring.top_k import observed
from megatron_infifpo.tokens.tokenization import ChatTokenizer

# The largest difference of a token, in nats. In bfloat16 two right programs differ by some tenths.
TOLERANCE = {False: 0.05, True: 1.0}
MEAN = 1 / 20  # of the largest one: how far all tokens may differ in the mean
LOOKED_AT = 50  # records for each that is compared: others may be of other domains


def check_agreement(
    job: ScoringJob, tokenizer: ChatTokenizer, limits: Limits, model: ScoringModel
) -> None:
    """Score the first records by transformers, too, and say how far the log-probs differ.

    Args:
        job: with `compared` records.
        tokenizer: of the model.
        limits: of the job.
        model: as the job's backend has it.

    Raises:
        UserError: they differ by more than two right programs do.
    """
    # Here: it imports Megatron, which takes seconds.
    from megatron_infifpo.scoring.transformers_backend import TransformersBackend

    texts = _first(job, tokenizer, limits, model)
    if not texts:
        print("log-probs are not compared: the first records are all masked", flush=True)
        return
    found = [[observed(o) for o in model(shard.rows, lambda row: None)] for shard in texts]
    other = TransformersBackend(
        load_causal_lm(
            job.model,
            dtype=torch.bfloat16 if job.bf16 else torch.float32,
            trust_remote_code=job.tokenizer_options.trust_remote_code,
            device_map={"": device_beside(job.model)},
        )
    )
    differences = []
    for shard, its in zip(texts, found, strict=True):
        differences.append((torch.cat(its) - torch.cat(other(shard.rows))).abs())
    _judge(job, [shard.records[0].id for shard in texts], differences)


def device_beside(model: str | Path) -> str:
    """Choose where a model goes beside an engine, which may have most of a GPU's memory."""
    device = cpu.device()
    if device == "cpu":
        return device
    needed = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    return device if free > 1.3 * needed + 2**30 else "cpu"


def _first(
    job: ScoringJob, tokenizer: ChatTokenizer, limits: Limits, model: ScoringModel
) -> list[ShardRows]:
    """Prepare the first records that are scored, each alone."""
    texts, looked_at = [], 0
    for record in iter_records(job.input, on_bad=job.on_bad_record, lists=job.lists):
        looked_at += 1
        shard = prepare_shard(
            0,
            [record],
            tokenizer,
            limits,
            vocab_size=model.vocab_size,
            row_tokens=job.micro_batch_tokens,
            max_row_tokens=job.max_row_tokens,
            layout=model.layout,
        )
        if shard.rows:
            texts.append(shard)
        if len(texts) == job.compared or looked_at == LOOKED_AT * job.compared:
            break
    return texts


def _judge(job: ScoringJob, ids: list[str], differences: list[torch.Tensor]) -> None:
    tolerance = TOLERANCE[job.bf16]
    together = torch.cat(differences)
    worst = max(range(len(ids)), key=lambda i: float(differences[i].max()))
    largest, mean = float(together.max()), float(together.mean())
    said = (
        f"log-probs of {job.backend} and of transformers: {len(together)} tokens of {len(ids)} "
        f"records differ by {largest:.2g} at most, {mean:.2g} in the mean (accepted: "
        f"{tolerance:g} and {tolerance * MEAN:g})"
    )
    if largest <= tolerance and mean <= tolerance * MEAN:  # NaN is neither
        print(said, flush=True)
        return
    kind = "bfloat16" if job.bf16 else "float32"
    raise UserError(
        f"{said}; most of all record {ids[worst]!r}. Expected the weights of {job.model}, in "
        f"{kind} ({'leave out' if job.bf16 else 'give'} --bf16 if vLLM has another type), not "
        "quantized, and a rope that does not depend on how long a text is; --compare-records 0 "
        "compares none"
    )
