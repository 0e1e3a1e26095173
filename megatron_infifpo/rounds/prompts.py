"""Which prompts a round takes: a function of the seed and the round, and of nothing else."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.rows.plan import permutation
from megatron_infifpo.storage.aside import write_text


def plan_round(count: int, per_round: int, *, seed: int, number: int) -> np.ndarray:
    """Choose a round's prompts.

    The stream of prompts is one permutation of the pool after the other, and a round takes the next
    `per_round` of it: every prompt comes once an epoch. Where a round goes over an epoch's end,
    what it has of the old epoch comes in the new one after the round, at the earliest.

    Args:
        count: prompts of the pool.
        per_round: prompts of a round, at most `count`.
        seed: of the permutations, >= 0.
        number: of the round, from 0.

    Returns:
        Positions in the pool, `[per_round]`, no two equal.
    """
    assert 0 < per_round <= count
    first, order = number * per_round, permutation(count, seed, 0)
    taken = [order[first : first + per_round]]
    for epoch in range(1, (first + per_round - 1) // count + 1):
        start = epoch * count  # of the epoch, in the stream
        begun = order[count - start % per_round :] if start % per_round else order[:0]
        order = permutation(count, seed, epoch)
        next_ones = order[~np.isin(order, begun)][: per_round - len(begun)]
        order = np.concatenate([next_ones, order[~np.isin(order, next_ones)]])
        taken.append(order[max(0, first - start) : first + per_round - start])
    return np.concatenate(taken)


def pool_sha256(pool: Sequence[Prompt]) -> str:
    """Return what tells one pool from another: all that its prompts say, in order."""
    content = json.dumps([asdict(prompt) for prompt in pool], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as `infifpo sample` reads them."""
    lines = [json.dumps(to_json(prompt), ensure_ascii=False) for prompt in prompts]
    write_text(path, "\n".join(lines) + "\n")


def to_json(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as a record."""
    found: dict[str, Any] = {"id": prompt.id, "domain": prompt.domain}
    found["prompt"] = list(prompt.messages)
    if prompt.tools:
        found["tools"] = list(prompt.tools)
    if prompt.template_options:
        found["chat_template_kwargs"] = dict(prompt.template_options)
    return found | ({"extra": prompt.extra} if prompt.extra else {})
