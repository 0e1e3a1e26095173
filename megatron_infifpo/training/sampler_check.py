"""Refuse samples that are not the policy's: a round starts from the model that has answered.

The sampler's own log-probs of a few responses, temperature 1, are compared token by token with
those of the model that is about to be trained. Stale weights are the usual difference, and nothing
else in a round shows them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from megatron.training import print_rank_0

from megatron_infifpo.errors import UserError
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.packing import collate_text
from megatron_infifpo.tokens.measured import MeasuredResponse, read_measured
from megatron_infifpo.training.probe import Difference, from_all, run_rows, share
from megatron_infifpo.training.reference_check import likely_cause, shown_tokens
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Start

# Mean absolute difference of all tokens, in nats, that precision explains: of two right programs in
# bfloat16 0.046 for SmolLM2 (docs/lab-log.md). Of a response alone, which has fewer, more.
TOLERANCES = {"float32": 0.002, "float16": 0.01, "bfloat16": 0.07, "float8": 0.4}
OF_ONE = 3  # times as much


def read_samples(run: Run) -> list[MeasuredResponse]:
    """Return the responses of `--sampler-logprobs` that the run's rows can hold.

    Raises:
        UserError: the file is broken, holds tokens that the model does not have, or none fits.
    """
    path = run.config.sampler_logprobs
    if path is None:
        return []
    samples = read_measured(path)
    for one in samples:
        largest = max(one.prompt_ids.max(), one.response_ids.max())
        if largest >= run.vocab_size:
            raise UserError(
                f"{path} holds the token id {largest} (of prompt {one.id!r}), but the model has "
                f"{run.vocab_size} tokens: {one.model} has another vocabulary, so it is not the "
                "policy; sample with the checkpoint that this run starts from, exported"
            )
    lengths = [len(one.prompt_ids) + len(one.response_ids) for one in samples]
    fitting = [one for one, n in zip(samples, lengths, strict=True) if n <= run.batch.max_tokens]
    if not fitting:
        raise UserError(
            f"{path}: every response is longer than --seq-length {run.batch.max_tokens} with its "
            f"prompt (the shortest has {min(lengths)} tokens): raise it, or sample shorter ones"
        )
    if len(fitting) < len(samples):
        print_rank_0(
            f"sampler check: {len(samples) - len(fitting)} of {len(samples)} responses are longer "
            f"than --seq-length {run.batch.max_tokens} with their prompts, and are left out",
            rank=run.layout.rank,
        )
    return fitting


def check_samples(
    run: Run,
    start: Start,
    samples: Sequence[MeasuredResponse],
    models: Sequence[torch.nn.Module],
    *,
    begins: bool,
) -> None:
    """Run the policy on the sampled responses; all ranks call it, once the checkpoint is loaded.

    Args:
        run: that is about to start.
        start: the checkpoint that it begins with.
        samples: from `read_samples`.
        models: this rank's chunks of the model.
        begins: whether a round begins here. Within a round the policy has moved: it says how far.

    Raises:
        UserError: the policy does not give these log-probs.
    """
    if not samples:
        return
    found = compare_samples(run, samples, models)
    on = f"sampler check: on {len(found)} responses"
    if not begins:
        moved = np.concatenate([one.by_token for one in found])
        print_rank_0(
            f"{on} the policy has moved by {moved.mean():+.4f} nats a token since they were "
            f"sampled, by {np.abs(moved).mean():.2g} in absolute value"
        )
        return
    tolerance = run.config.sampler_tolerance
    if tolerance is None:
        types = [run.precision.dtype, *(["float8"] if run.precision.fp8 else [])]
        tolerance = max(TOLERANCES[name] for name in types)
    mean = float(np.average([one.size for one in found], weights=[len(one.now) for one in found]))
    worst = max(found, key=lambda one: one.size)
    if mean <= tolerance and worst.size <= OF_ONE * tolerance:
        print_rank_0(
            f"{on} the policy agrees with {run.config.sampler_logprobs} within {mean:.2g} nats a "
            f"token (tolerance {tolerance}), and within {worst.size:.2g} in the worst of them"
        )
        return
    if run.layout.rank != 0:
        raise UserError("the sampler check failed: see rank 0")
    raise UserError(failure(run, start, samples, found, tolerance))


def compare_samples(
    run: Run, samples: Sequence[MeasuredResponse], models: Sequence[torch.nn.Module]
) -> list[Difference]:
    """Run every response under the model as it is; each replica its share, and all get all."""

    def row(index: int) -> Row:
        one = samples[index]
        return collate_text(one.prompt_ids, one.response_ids, run.batch.rows)

    mine = share(range(len(samples)))
    outputs = run_rows(run, models, [row(i) for i in mine], lambda: row(0))
    return from_all(
        [
            Difference(i, 0, output.float().numpy(), samples[i].logprobs)
            for i, output in zip(mine, outputs, strict=False)
        ]
    )


def failure(
    run: Run,
    start: Start,
    samples: Sequence[MeasuredResponse],
    found: Sequence[Difference],
    tolerance: float,
) -> str:
    """Say by how much the policy differs, why probably, and show the worst response."""
    bad = sorted((one for one in found if one.size > tolerance), key=lambda one: -one.size)
    sizes, worst = np.concatenate([np.abs(one.by_token) for one in found]), samples[bad[0].index]
    lines = [
        f"the policy that this round starts from is not the one that was sampled: {len(sizes)} "
        f"tokens of {len(found)} responses in {run.config.sampler_logprobs} differ by "
        f"{sizes.mean():.3g} nats in the mean, and by {bad[0].size:.3g} in the worst response "
        f"(accepted: {tolerance:g} and {OF_ONE * tolerance:g}, --sampler-tolerance)",
        f"  likely: {likely_cause(bad, tolerance)}",
        f"  sampled from {worst.model}; training in {run.precision.dtype}",
        f"  a response of {worst.id!r}, {bad[0].size:.3g} nats a token",
        *shown_tokens(bad[0], worst.response_ids),
        f"expected the same weights (stale or quantized ones differ), chat template and tokenizer, "
        f"and log-probs of temperature 1: {start.how_to_sample} again",
    ]
    return "\n".join(lines)
