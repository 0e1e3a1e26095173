"""Scoring as one of several ranks."""

from typing import Any

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


def megatron_logprobs_at(hf: str, rows: str, layout: dict[str, int]) -> list[torch.Tensor] | None:
    """The same at any layout: options of the backend."""
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    backend = MegatronBackend(hf, **layout)
    output = backend(torch.load(rows))
    return output if backend.is_writer else None
