"""Tokens that are not scored: rows, log-probs and losses against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.logprobs import segment_sums
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.reference import PairValues
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.training.objective import pair_losses

CALM = settings(deadline=None, database=None, max_examples=60)


@st.composite
def marked_pairs(draw):
    responses, sources = draw(st.integers(1, 3)), 2
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    made = []
    for index in range(draw(st.integers(1, 4))):
        ids = tuple(
            rng.integers(0, 30, rng.integers(1, 8), dtype=np.int32) for _ in range(responses)
        )
        marks = tuple(rng.random(len(part)) < draw(st.sampled_from([0.2, 0.7])) for part in ids)
        for mark in marks:
            mark[rng.integers(len(mark))] = True
        made.append(
            PreferencePair(
                index, rng.integers(0, 30, rng.integers(1, 6), dtype=np.int32), ids,
                values=PairValues(
                    initial_sum_logps=-9 * rng.random(responses, dtype=np.float32),
                    source_sum_logps=-9 * rng.random((responses, sources), dtype=np.float32),
                    source_token_counts=rng.integers(1, 9, (responses, sources)),
                    source_mask=np.array([True, draw(st.booleans())]),
                    source_weights=np.ones(sources + 1, np.float32),
                    source_scales=np.ones(sources + 1, np.float32),
                ),
                scored=marks if draw(st.booleans()) else None,
            )
        )  # fmt: skip
    return made


def by_loop(batch):
    """(b, r, text before the token, token) of every scored token, in order."""
    for b, pair in enumerate(batch):
        marks = scored_marks(pair.response_ids, pair.scored)
        for r, (ids, mark) in enumerate(zip(pair.response_ids, marks, strict=True)):
            text = [*pair.prompt_ids.tolist(), *ids.tolist()]
            for t in range(len(ids)):
                if mark[t]:
                    position = len(pair.prompt_ids) + t
                    yield b, r, text[:position], text[position]


@CALM
@given(marked_pairs(), st.integers(1, 8), st.booleans())
def test_a_row_scores_the_marked_tokens(batch, multiple, share):
    row = collate(batch, RowLayout(multiple, share_prompt=share))
    wanted = list(by_loop(batch))
    responses = len(batch[0].response_ids)
    assert row["target_ids"].tolist() == [token for *_, token in wanted]
    assert row["segment_ids"].tolist() == [b * responses + r for b, r, *_ in wanted]
    counts = torch.bincount(row["segment_ids"], minlength=len(batch) * responses)
    assert torch.equal(row["token_counts"], counts.view(len(batch), responses))
    # What stands before a scored token is all that its row sees: whole texts, marks or none.
    borders, tokens = row["cu_seqlens"].tolist(), row["tokens"][0]
    for place, (b, r, before, _) in zip(row["scored_rows"].tolist(), wanted, strict=True):
        segment = next(s for s, end in enumerate(borders[1:]) if place < end)
        seen = tokens[borders[segment] : place + 1]
        if share:
            keys = row["cu_seqlens_kv"].tolist()
            segment = b * responses + r  # a first token is predicted in the pair's first segment
            rows = row["key_rows"][keys[segment] : keys[segment + 1]]
            seen = tokens[rows[: len(before)]]
            assert rows[len(before) - 1] == place
        assert seen.tolist() == before
        assert row["position_ids"][0, place] == len(before) - 1


@CALM
@given(marked_pairs(), st.booleans())
def test_losses_are_of_the_marked_tokens(batch, share):
    """DPO on sums and InfiFPO on means, by formulas, from a log-prob for every place in a text."""
    if len(batch[0].response_ids) != 2:
        return
    row = collate(batch, RowLayout(share_prompt=share))

    def logp(before, token):  # any function of text and token will do
        return -((sum(before) * 7 + token * 3 + len(before)) % 11) / 4 - 0.1

    values: dict[tuple[int, int], list[float]] = {}
    for b, r, before, token in by_loop(batch):
        values.setdefault((b, r), []).append(logp(before, token))
    flat = torch.tensor([v for found in values.values() for v in found])
    sums = segment_sums(flat, row["segment_ids"], 2 * len(batch)).view(len(batch), 2)
    dpo = pair_losses(resolve("dpo", beta=0.3), row, sums, progress=0.0)[0].tolist()
    means = resolve("infifpo", fusion="average", clip=False)
    infifpo = pair_losses(means, row, sums, progress=0.0)[0].tolist()
    for b, pair in enumerate(batch):
        theirs = pair.values.source_sum_logps / pair.values.source_token_counts
        sides = []
        for r in range(2):
            mine = values[b, r]
            reference = float(theirs[r][pair.values.source_mask].mean())
            sides.append(
                (sum(mine) - pair.values.initial_sum_logps[r], sum(mine) / len(mine) - reference)
            )
        (w_sum, w_mean), (l_sum, l_mean) = sides
        assert dpo[b] == pytest.approx(math.log1p(math.exp(-0.3 * (w_sum - l_sum))), rel=1e-4)
        wanted = math.log1p(math.exp(-means.beta * (w_mean - l_mean)))
        assert infifpo[b] == pytest.approx(wanted, rel=1e-4)
