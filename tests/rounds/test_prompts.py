"""The plan of prompts: every one once an epoch, none twice in a round, the same on any call."""

import numpy as np
import pytest

from megatron_infifpo.responses.prompts import Prompt, read_prompts
from megatron_infifpo.rounds.prompts import plan_round, pool_sha256, write_prompts
from megatron_infifpo.rows.plan import permutation


@pytest.mark.parametrize(
    ("count", "per_round"), [(12, 4), (12, 5), (10, 7), (9, 9), (7, 6), (5, 1), (100, 64)]
)
def test_every_prompt_once_an_epoch(count, per_round):
    rounds = [plan_round(count, per_round, seed=3, number=r) for r in range(count)]
    assert all(len(set(taken.tolist())) == per_round for taken in rounds)
    stream = np.concatenate(rounds).reshape(-1, count)
    assert (np.sort(stream, axis=1) == np.arange(count)).all()
    orders = {tuple(epoch) for epoch in stream.tolist()}
    assert len(stream) == 1 or len(orders) > 1, "epochs have orders of their own"


def test_whole_rounds_are_the_permutation():
    """Where no round goes over an epoch's end, the stream is that of the permutations."""
    rounds = [plan_round(12, 4, seed=7, number=r) for r in range(9)]
    epochs = np.concatenate(rounds).reshape(3, 12)
    assert (epochs == [permutation(12, 7, epoch) for epoch in range(3)]).all()


def test_over_the_end_of_an_epoch():
    """What a round has of the old epoch comes right after its prompts of the new one, or later."""
    first, second = permutation(10, 1, 0), permutation(10, 1, 1)
    taken = plan_round(10, 7, seed=1, number=1)
    rest = set(first[7:].tolist())
    assert taken[:3].tolist() == first[7:].tolist()
    assert taken[3:].tolist() == [p for p in second.tolist() if p not in rest][:4]


def test_seeds_and_rounds_differ():
    taken = [plan_round(1000, 10, seed=s, number=r).tolist() for s in (1, 2) for r in (0, 1)]
    assert len({tuple(one) for one in taken}) == 4


def test_prompts_go_through_a_file(tmp_path):
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    pool = [
        Prompt("a", "math", ({"role": "user", "content": "1 + 1 — ?"},), {"answer": "2"}),
        Prompt("b", "code", ({"role": "user", "content": "x"},), {}, tools, {"think": False}),
    ]
    write_prompts(tmp_path / "prompts.jsonl", pool)
    found = read_prompts([str(tmp_path / "prompts.jsonl")])
    assert found == pool and pool_sha256(found) == pool_sha256(pool)
    assert pool_sha256(pool[::-1]) != pool_sha256(pool)
