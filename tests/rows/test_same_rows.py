"""Plans and rows are those of before: a run that is resumed must go on with the same.

On one data-parallel rank, and of a shard, they are the ones of version 0.1.
"""

import hashlib
import json

import numpy as np
import torch

from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.plan import (
    Rows,
    fill,
    fitting_micro_batch_size,
    plan_evaluation,
    plan_step,
)
from megatron_infifpo.rows.preference_dataset import PreferencePair

LENGTHS = np.random.Generator(np.random.Philox(3)).integers(2, 4000, 900)
# Written by the packers of version 0.1, before they were one.
PLANS = {
    "steps": "6e7ceb619f4d560b",
    "evaluation": "cb22d798d57d6f84",
    "shard": "7c09513c0cd02fc7",
    "sizes": "443172f7ec327667",
}
FOUR_RANKS = "3773ca43d903dee5"
ROWS = {
    (1, False): "8b4e08acd060fb62",
    (7, False): "d98b2f58a1981452",
    (1, True): "9cc521d22346c7be",
    (33, True): "531223d061c24b5f",
}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def steps_of(ranks: int) -> list[list[Rows]]:
    run = {"seed": 11, "global_batch_size": 128, "data_parallel_size": ranks}
    shapes = [(step, rows) for step in range(9) for rows in (1, 8, 32)]
    return [plan_step(LENGTHS, step=s, num_microbatches=rows, **run) for s, rows in shapes]


def found_plans() -> dict[str, str]:
    steps = [plan[0] for plan in steps_of(1)]
    sizes = {"steps": 7, "data_parallel_size": 1, "num_microbatches": 16}
    evaluation = [plan_evaluation(LENGTHS, step=s, **sizes)[0] for s in range(8)]
    lengths = np.where(np.arange(900) % 7 == 3, 0, LENGTHS)
    shard = [fill(lengths, budget) for budget in (1, 3000, 16_384)]
    run = {"seed": 11, "steps": 7, "global_batch_size": 64, "data_parallel_size": 1}
    fitting = [fitting_micro_batch_size(LENGTHS, n, **run) for n in (4000, 9000, 30_000)]
    found = {"steps": steps, "evaluation": evaluation, "shard": shard, "sizes": fitting}
    return {name: digest(value) for name, value in found.items()}


def pairs() -> list[PreferencePair]:
    rng = np.random.Generator(np.random.Philox(5))

    def ids(most: int) -> np.ndarray:
        return rng.integers(0, 999, int(rng.integers(1, most)), dtype=np.int32)

    made = []
    for index in range(12):
        responses = tuple(ids(40) for _ in range(3))
        scored = tuple(rng.random(len(r)) < 0.7 for r in responses) if index % 3 else None
        made.append(PreferencePair(index, ids(90), responses, index % 2, scored=scored))
    return made


def row_digest(row) -> str:
    later = {"valid", "ended"}  # there when the digests were taken were all others
    listed = {k: v.tolist() if torch.is_tensor(v) else v for k, v in row.items() if k not in later}
    return digest([(k, str(getattr(row[k], "dtype", "")), listed[k]) for k in sorted(listed)])


def test_plans_are_the_same():
    assert found_plans() == PLANS
    assert digest(steps_of(4)) == FOUR_RANKS


def test_rows_are_the_same():
    for (multiple, share), expected in ROWS.items():
        row = collate(pairs(), RowLayout(multiple, share_prompt=share))
        assert row_digest(row) == expected, (multiple, share)


def test_layouts_of_one_multiple_make_one_row():
    rows = [collate(pairs(), RowLayout(*sizes)) for sizes in ((32, 1), (2, 16), (1, 32))]
    assert len({row_digest(row) for row in rows}) == 1
