"""Scoring as one of several ranks."""

from typing import Any

import numpy as np
import torch

from support.tools import run_tool


def score(argv: list[str]) -> None:
    """Run `python tools/score_source.py ARGV` as one rank."""
    run_tool("score_source", argv)


def score_from_python(fields: dict[str, Any]) -> None:
    """Score as one rank, without a command line."""
    from megatron_infifpo.scoring.job import ScoringJob
    from megatron_infifpo.scoring.score import score

    score(ScoringJob(**fields))


def megatron_logprobs(hf: str, rows: str, tp: int, pp: int) -> list[torch.Tensor] | None:
    """Log-probs of saved rows from the Megatron backend, on the rank that writes."""
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    backend = MegatronBackend(hf, tensor_parallel=tp, pipeline_parallel=pp)
    output = backend(torch.load(rows))
    return output if backend.is_writer else None


def score_jobs(jobs: list[list[str]]) -> None:
    """Score several models one after the other, at one layout."""
    for argv in jobs:
        score(argv)


def megatron_logprobs_at(
    hf: str, texts: list[list[int]], layout: dict[str, Any]
) -> list[torch.Tensor] | None:
    """Log-probs of texts, each in a row of its own, at any layout: options of the backend."""
    from megatron_infifpo.rows.packing import collate_text
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    backend = MegatronBackend(hf, **layout)
    ids = [np.array(text, dtype=np.int32) for text in texts]
    output = backend([collate_text(one[:1], one[1:], backend.layout) for one in ids])
    return output if backend.is_writer else None
