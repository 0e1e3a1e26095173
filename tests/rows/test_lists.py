"""Lists of responses: which of them a method sees, and what a row has of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.sources import Source, SourcesConfig
from megatron_infifpo.rows.choice import NO_CONTRAST, NO_SCORES, choose
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from support.datasets import list_record, record, write_scores, write_tokens

RECORDS = [list_record(i, domain=("math", "code")[i % 2]) for i in range(24)]
SCORES = [r.scores or () for r in RECORDS]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Prefix of the tokens, and the configuration of an initial pivot and two sources."""
    folder = tmp_path_factory.mktemp("lists")
    tokens = write_tokens(folder, RECORDS)
    write_scores(folder / "pivot", RECORDS, tokens.scored_lengths)
    twice = tokens.scored_lengths * 2
    write_scores(folder / "all", RECORDS, twice, masked=[4], seed=1)
    write_scores(folder / "code", RECORDS, tokens.scored_lengths * 3, seed=2)
    sources = (
        Source("all", str(folder / "all"), weight=2.0),
        Source("code", str(folder / "code"), ("code",), weight=0.5),
    )
    return tokens.prefix, SourcesConfig(str(folder / "pivot"), sources, initial_weight=0.25)


def wanted_columns(responses, rewards) -> list[list[int] | None]:
    """Which responses of each record are taken, by a loop; None: it is left out."""
    found: list[list[int] | None] = []
    for r, scores in zip(RECORDS, SCORES, strict=True):
        scored = [i for i, score in enumerate(scores) if math.isfinite(score)]
        if responses is None:
            taken = scored if rewards else list(range(len(r.responses)))
            found.append(taken if len(taken) >= 2 else None)
            continue
        best, worst = (pick(scored, key=scores.__getitem__, default=0) for pick in (max, min))
        same = scores[best] == scores[worst] and responses == 2
        enough = len(scored) >= responses and not same
        found.append([best, worst][:responses] if enough else None)
    return found


@pytest.mark.parametrize(
    ("responses", "rewards"), [(None, True), (None, False), (2, False), (1, False)]
)
def test_a_method_sees_the_responses_that_it_compares(joined, responses, rewards):
    dataset = PreferenceDataset(*joined, responses=responses, rewards=rewards)
    usable = set(dataset.eligible(10_000).tolist())
    seen = 0
    for i, taken in enumerate(wanted_columns(responses, rewards)):
        assert (i in usable) == (taken is not None), i
        if taken is None:
            continue
        seen += len(taken) < len(RECORDS[i].responses)
        columns = dataset.columns[i]
        assert columns[columns >= 0].tolist() == taken and (columns[len(taken) :] == -1).all()
        pair, all_ids = dataset[i], dataset.tokens.response_ids(i)
        assert len(all_ids) == len(RECORDS[i].responses)
        for r, ids in enumerate(pair.response_ids):
            np.testing.assert_array_equal(ids, all_ids[taken[r]] if r < len(taken) else ())
        scores = [SCORES[i][c] for c in taken]
        padded = np.nan_to_num([*scores, *[0.0] * (dataset.responses - len(taken))])
        np.testing.assert_array_equal(pair.rewards, padded)
        assert dataset.names(i) == tuple(f"response_{c}" for c in taken)
    assert seen or responses is None
    reasons = {NO_SCORES, NO_CONTRAST} & dataset.left_out(10_000).keys()
    assert bool(reasons) == (responses == 2 or rewards)


def test_none_is_left(tmp_path):
    """A longer --seq-length is advised only where it helps."""
    alone = [replace(list_record(i, most=2), scores=(1.0, math.nan)) for i in range(3)]
    write_tokens(tmp_path, alone)
    dataset = PreferenceDataset(tmp_path / "tokens", responses=2)
    with pytest.raises(UserError, match=rf"is left \(3 {NO_SCORES}\)$"):
        dataset.require_eligible(10_000)
    best = PreferenceDataset(tmp_path / "tokens", responses=1)
    assert best.columns.tolist() == [[0]] * 3 and len(best.eligible(10_000)) == 3
    with pytest.raises(UserError, match="the shortest needs .* and --seq-length is 3; raise it"):
        best.require_eligible(3)


@pytest.mark.parametrize("share", [False, True])
def test_a_row_holds_the_responses_that_are_there(joined, share):
    dataset = PreferenceDataset(*joined, responses=None, rewards=True)
    layout = RowLayout(4, share_prompt=share)
    indices = dataset.eligible(10_000)[:7]
    row = collate([dataset[int(i)] for i in indices], layout)
    tokens, references, config = dataset.tokens, dataset.references, joined[1]
    assert references is not None
    assert row["tokens"].numel() % 4 == 0
    length = dataset.pair_lengths(layout)[indices].sum()
    assert row["tokens"].numel() == length + layout.padding(int(length))
    scored = iter(row["target_ids"].tolist())
    segments = 0
    for b, i in enumerate(indices.tolist()):
        columns = dataset.columns[i]
        for r, c in enumerate(columns.tolist()):
            assert row["valid"][b, r] == (c >= 0) == row["ended"][b, r]
            if c < 0:
                assert row["token_counts"][b, r] == 0 and row["rewards"][b, r] == 0
                assert row["initial_sum_logps"][b, r] == 0
                assert (row["source_sum_logps"][b, r] == 0).all()
                assert (row["source_token_counts"][b, r] == 1).all()
                continue
            segments += 1
            ids = tokens.response_ids(i)[c].tolist()
            assert [next(scored) for _ in ids] == ids
            assert row["token_counts"][b, r] == len(ids)
            assert row["rewards"][b, r] == SCORES[i][c]
            initial = np.float32(references.initial.store.sums(i)[c])
            assert row["initial_sum_logps"][b, r] == initial
            for m, source in enumerate(references.sources):
                inside = i != 4 if m == 0 else RECORDS[i].domain == "code"
                assert row["source_mask"][b, m] == inside
                total = np.float32(source.store.sums(i)[c]) if inside else 0
                assert row["source_sum_logps"][b, r, m] == total
                assert row["source_token_counts"][b, r, m] == (
                    (2, 3)[m] * len(ids) if inside else 1
                )
        assert row["source_weights"][b].tolist() == list(config.weights) == [2.0, 0.5, 0.25]
    assert next(scored, None) is None
    assert len(row["segment_lengths"]) == segments + (layout.padding(int(length)) > 0)
    table = references.table(indices, dataset.columns[indices])
    for name, column in table.items():
        assert torch.equal(column.to(row[name].dtype), row[name]), name


def test_what_a_method_cannot_see(tmp_path):
    plain = write_tokens(tmp_path, [list_record(i, scores=False) for i in range(4)], "plain")
    pairs = write_tokens(tmp_path, [record(i) for i in range(4)], "pairs")
    for responses, rewards in ((2, False), (1, False), (None, True)):
        with pytest.raises(UserError, match="has no scores .* infifpo label --list"):
            choose(plain, responses, rewards=rewards)
    assert choose(plain, None).columns.shape == (4, 5)
    with pytest.raises(UserError, match="has no scores"):
        choose(pairs, None, rewards=True)
    assert choose(pairs, None).columns.tolist() == [[0, 1]] * 4
    with pytest.raises(UserError, match="'r-0' of .* has no 'pivot_chosen'"):
        choose(plain, 3)
