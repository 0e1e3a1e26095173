import collections
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.reference import PairValues
from megatron_infifpo.references.sources import Source, SourcesConfig
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.loaders import EvaluationLoader, PreferenceLoader
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.plan import evaluation_steps, plan_evaluation, plan_step
from megatron_infifpo.rows.preference_dataset import PreferenceDataset, PreferencePair
from support.datasets import record, write_scores, write_tokens

LENGTHS = st.lists(st.integers(2, 5000), min_size=1, max_size=60).map(np.array)
# Machines with few cores miss deadlines; nothing is kept between runs.
CALM = settings(deadline=None, database=None)
SEEDS = st.integers(0, 2**32)
ONE_ROW = {"data_parallel_size": 1, "num_microbatches": 1}


def flat(rows):
    return [sample for row in rows for sample in row]


@CALM
@given(LENGTHS, SEEDS, st.integers(1, 40))
def test_an_epoch_covers_every_pair_once(lengths, seed, batch):
    n = len(lengths)
    steps = batch  # n * batch samples: exactly `batch` epochs
    stream = [
        plan_step(lengths, seed=seed, step=s, global_batch_size=batch, **ONE_ROW)[0][0]
        for s in range(min(steps * n // batch, 60))
    ]
    counts = collections.Counter(flat(stream))
    total = len(flat(stream))
    assert set(counts.values()) <= {total // n, total // n + 1}
    if total % n == 0:
        assert set(counts.values()) == {total // n} and len(counts) == n


def test_epochs_and_seeds_differ_and_the_order_is_fixed():
    lengths = np.full(50, 7)

    def order(seed, epoch):
        steps = range(epoch * 50, epoch * 50 + 50)
        one = {"global_batch_size": 1, **ONE_ROW}
        return [plan_step(lengths, seed=seed, step=s, **one)[0][0][0] for s in steps]

    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]
    # Written down: a run must resume with the same order under another version of NumPy.
    assert orders[0][:8] == [3, 5, 24, 27, 43, 44, 42, 26]


@CALM
@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_an_evaluation_takes_every_pair_once(count, batch, data):
    ranks = data.draw(st.integers(1, batch))
    micro = data.draw(st.integers(1, batch // ranks))
    rows = ranks * micro
    lengths = np.arange(1, count + 1)
    if count < rows:
        with pytest.raises(UserError, match=f"validation has {count} pairs for {rows} rows"):
            evaluation_steps(count, batch, rows)
        return
    steps = evaluation_steps(count, batch, rows)
    shape = {"steps": steps, "data_parallel_size": ranks, "num_microbatches": micro}
    plans = [plan_evaluation(lengths, step=s, **shape) for s in range(steps)]
    assert sorted(flat(flat(flat(plans)))) == list(range(count))
    assert all(len(plan) == ranks for plan in plans)
    assert all(all(share) and len(share) == micro for share in flat(plans))
    assert plan_evaluation(lengths, step=steps, **shape) == plans[0]


@st.composite
def pairs(draw, sources=2):
    responses = draw(st.integers(2, 3))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    made = []
    for index in range(draw(st.integers(1, 5))):
        lengths = [draw(st.integers(1, 9)) for _ in range(responses)]
        made.append(
            PreferencePair(
                index=100 + index,
                prompt_ids=rng.integers(0, 99, draw(st.integers(1, 9)), dtype=np.int32),
                response_ids=tuple(rng.integers(0, 99, n, dtype=np.int32) for n in lengths),
                domain_code=index % 2,
                values=PairValues(
                    initial_sum_logps=-rng.random(responses, dtype=np.float32),
                    source_sum_logps=-rng.random((responses, sources), dtype=np.float32),
                    source_token_counts=rng.integers(1, 9, (responses, sources)),
                    source_mask=rng.random(sources) < 0.5,
                    source_weights=rng.random(sources + 1, dtype=np.float32),
                    source_scales=rng.random(sources + 1, dtype=np.float32),
                ),
            )
        )
    return made


@CALM
@given(pairs(), st.integers(1, 8))
def test_a_row_holds_whole_pairs(batch, multiple):
    row = collate(batch, RowLayout(multiple))
    segments = [(pair, ids) for pair in batch for ids in pair.response_ids]
    responses = len(batch[0].response_ids)
    tokens, borders = row["tokens"][0], row["cu_seqlens"].tolist()
    total = sum(len(p.prompt_ids) + len(ids) for p, ids in segments)
    tail = len(tokens) - total
    assert len(tokens) % multiple == 0 and 0 <= tail < multiple
    assert (tokens[total:] == 0).all()
    assert borders[0] == 0 and borders[-1] == len(tokens)
    assert len(borders) == len(segments) + 1 + (tail > 0)
    assert row["max_seqlen"] == max(np.diff(borders))
    positions = row["position_ids"][0]
    scored = collections.defaultdict(list)
    for t, target, segment in zip(
        *(row[k].tolist() for k in ("scored_rows", "target_ids", "segment_ids")), strict=True
    ):
        assert borders[segment] <= t and t + 1 < borders[segment + 1]  # never over a border
        assert tokens[t + 1] == target
        scored[segment].append(t)
    for s, (pair, ids) in enumerate(segments):
        start, end = borders[s], borders[s + 1]
        assert tokens[start:end].tolist() == [*pair.prompt_ids, *ids]
        assert positions[start:end].tolist() == list(range(end - start))
        # From the last position of the prompt, which predicts the first response token, to the
        # last but one, which predicts the end of the turn.
        first = start + len(pair.prompt_ids) - 1
        assert scored[s] == list(range(first, end - 1))
        assert tokens[scored[s][0] + 1] == ids[0] and tokens[scored[s][-1] + 1] == ids[-1]
        assert row["token_counts"][s // responses, s % responses] == len(ids) == len(scored[s])
    assert positions[total:].tolist() == list(range(tail))
    assert row["indices"].tolist() == [pair.index for pair in batch]
    assert row["domain_codes"].tolist() == [pair.domain_code for pair in batch]


@CALM
@given(pairs(), st.integers(1, 8))
def test_a_shared_prompt_is_there_once(batch, multiple):
    """Its keys, gathered, are those of the row with copies; every other thing is the same."""
    row = collate(batch, RowLayout(multiple, share_prompt=True))
    copies = collate(batch)
    tokens = row["tokens"][0]
    total = sum(len(p.prompt_ids) + sum(len(ids) for ids in p.response_ids) for p in batch)
    assert len(tokens) == total + -total % multiple
    wanted = copies["tokens"][0]
    key_tokens, key_positions = (
        x[0][row["key_rows"]] for x in (row["tokens"], row["position_ids"])
    )
    assert torch.equal(key_tokens[: len(wanted)], wanted)
    assert torch.equal(key_positions[: len(wanted)], copies["position_ids"][0])
    segments = len(copies["cu_seqlens"])
    assert torch.equal(row["cu_seqlens_kv"][:segments], copies["cu_seqlens"])
    assert row["max_seqlen_kv"] == max(np.diff(row["cu_seqlens_kv"]))
    assert row["cu_seqlens"][-1] == len(tokens) and row["cu_seqlens_kv"][-1] == len(key_tokens)
    for name in ("target_ids", "segment_ids", "token_counts", "indices", "initial_sum_logps"):
        assert torch.equal(row[name], copies[name]), name
    # Each segment's queries are the last of its keys.
    for q, k in zip(row["cu_seqlens"].tolist()[1:], row["cu_seqlens_kv"].tolist()[1:], strict=True):
        assert row["key_rows"][k - 1] == q - 1
    # A token is predicted by the one before it in its text, wherever that lies.
    texts = zip(row["scored_rows"].tolist(), copies["scored_rows"].tolist(), strict=True)
    for here, there in texts:
        assert row["position_ids"][0, here] == copies["position_ids"][0, there]
        assert tokens[here] == wanted[there]


@CALM
@given(pairs())
def test_types_and_shapes(batch):
    row = collate(batch, RowLayout(4))
    b, r, m, k = len(batch), len(batch[0].response_ids), 2, row["scored_rows"].numel()
    expected = {
        "tokens": (torch.int64, (1, row["tokens"].shape[1])),
        "position_ids": (torch.int64, tuple(row["tokens"].shape)),
        "cu_seqlens": (torch.int32, tuple(row["cu_seqlens"].shape)),
        "scored_rows": (torch.int64, (k,)),
        "target_ids": (torch.int64, (k,)),
        "segment_ids": (torch.int64, (k,)),
        "token_counts": (torch.int64, (b, r)),
        "valid": (torch.bool, (b, r)),
        "ended": (torch.bool, (b, r)),
        "indices": (torch.int64, (b,)),
        "domain_codes": (torch.int64, (b,)),
        "initial_sum_logps": (torch.float32, (b, r)),
        "source_sum_logps": (torch.float32, (b, r, m)),
        "source_token_counts": (torch.int64, (b, r, m)),
        "source_mask": (torch.bool, (b, m)),
        "source_weights": (torch.float32, (b, m + 1)),
        "source_scales": (torch.float32, (b, m + 1)),
    }
    found = {k: (v.dtype, tuple(v.shape)) for k, v in row.items() if torch.is_tensor(v)}
    assert found == expected and isinstance(row["max_seqlen"], int)
    np.testing.assert_array_equal(row["source_mask"][-1].numpy(), batch[-1].values.source_mask)
    bare = [PreferencePair(p.index, p.prompt_ids, p.response_ids) for p in batch]
    assert set(row) - set(collate(bare)) == {
        "initial_sum_logps",
        "source_sum_logps",
        "source_token_counts",
        "source_mask",
        "source_weights",
        "source_scales",
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    records = [record(i) for i in range(23)]
    tokens = write_tokens(folder, records)
    write_scores(folder / "pivot", records, tokens.response_lengths, masked=[4])
    write_scores(folder / "one", records, tokens.response_lengths + 1, seed=1)
    config = SourcesConfig(str(folder / "pivot"), (Source("one", str(folder / "one")),))
    return PreferenceDataset(tokens.prefix, config)


def loader(dataset, rank=0, ranks=1, micro=2, kind=PreferenceLoader, **options):
    options = {"global_batch_size": 8, "max_tokens": 1000, "layout": RowLayout(4)} | options
    return kind(
        dataset,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        num_microbatches=micro,
        **options,
    )


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a
    )


@settings(CALM, max_examples=20)
@given(st.integers(0, 9), st.integers(0, 99), st.sampled_from([(1, 1), (2, 2), (4, 1), (2, 4)]))
def test_resume_continues_the_uninterrupted_stream(dataset, step, seed, layout):
    ranks, micro = layout
    for rank in range(ranks):
        whole = loader(dataset, rank, ranks, micro, seed=seed)
        rest = itertools.islice(whole, step * micro, (step + 2) * micro)
        resumed = loader(dataset, rank, ranks, micro, seed=seed, start_step=step)
        for a, b in zip(rest, resumed, strict=False):
            assert equal(a, b)


def test_every_layout_trains_on_the_same_pairs(dataset):
    def taken(ranks, micro, steps=3):
        loaders = [loader(dataset, rank, ranks, micro, seed=5) for rank in range(ranks)]
        return [
            sorted(
                index
                for one in loaders
                for _ in range(micro)
                for index in next(one)["indices"].tolist()
            )
            for _ in range(steps)
        ]

    expected = taken(1, 1)
    assert all(len(step) == 8 and 4 not in step for step in expected)  # 4: masked by the pivot
    for layout in ((1, 4), (2, 2), (4, 2), (8, 1)):
        assert taken(*layout) == expected


def test_evaluation_covers_the_held_out_pairs_again_and_again(dataset):
    ranks, micro = 2, 2
    loaders = [loader(dataset, r, ranks, micro, EvaluationLoader) for r in range(ranks)]
    steps = loaders[0].steps
    rounds = []
    for _ in range(2):
        rows = [next(one) for one in loaders for _ in range(steps * micro)]
        rounds.append(sorted(index for row in rows for index in row["indices"].tolist()))
    assert rounds[0] == rounds[1] == [i for i in range(23) if i != 4]


def test_long_pairs_are_left_out(dataset):
    """And no token of the others is: nothing is cut."""
    limit = int(np.median(dataset.segment_lengths))
    rows = [*itertools.islice(loader(dataset, max_tokens=limit), 20)]
    seen = {index for row in rows for index in row["indices"].tolist()}
    assert seen == set(dataset.eligible(limit).tolist())
    for row in rows:
        whole = int(dataset.pair_lengths()[row["indices"]].sum())
        assert row["tokens"].shape == (1, whole + RowLayout(4).padding(whole))
    with pytest.raises(UserError, match="none of the 23 records .* --seq-length is 3"):
        loader(dataset, max_tokens=3)


def test_batch_sizes(dataset):
    with pytest.raises(UserError, match="--global-batch-size is 8 pairs for 16 rows"):
        loader(dataset, ranks=8)
    with pytest.warns(UserWarning, match="only 22 pairs"):
        large = loader(dataset, global_batch_size=50, micro=1)
    counts = collections.Counter(next(large)["indices"].tolist())
    assert sum(counts.values()) == 50 and set(counts.values()) == {2, 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader(dataset, global_batch_size=22)


@pytest.mark.parametrize("layout", [RowLayout(4), RowLayout(2, 1, True, 4)], ids=["tp4", "cp4"])
def test_what_a_step_wastes_is_what_its_loaders_say(dataset, layout):
    """Of ranks that share rows each has its part, and all say the same."""
    shared = layout.context_parallel
    for ranks, micro in ((2, 4), (4, 2), (2, 2)):
        loaders = [
            [loader(dataset, r, ranks, micro, seed=1, layout=layout, context_rank=c)
             for c in range(shared)]
            for r in range(ranks)
        ]  # fmt: skip
        for _ in range(2):
            rows = [[[next(one) for _ in range(micro)] for one in group] for group in loaders]
            loads = [sum(row["tokens"].numel() for own in group for row in own) for group in rows]
            indices = [row["indices"] for group in rows for row in group[0]]
            used = sum(int(dataset.pair_lengths(layout)[i].sum()) for i in indices)
            imbalance = 1 - sum(loads) / (ranks * max(loads))
            waste = {"imbalance": imbalance, "padding": 1 - used / sum(loads)}
            for row in (row for group in rows for own in group for row in own):
                found = {name: row[f"waste/{name}"].tolist() for name in waste}
                assert found == {name: pytest.approx([x, 1.0]) for name, x in waste.items()}
            ends = [False] * (micro - 1) + [True]
            assert all([row["ends_step"] for row in own] == ends for own in rows[0])


def test_waste_of_a_known_plan():
    """By hand: rows of 117 and 101 tokens on four ranks that share them, two of tensor parallelism.

    Pieces differ by six tokens at the most, and eight ranks have equal shares: 128 and 112 tokens.
    """
    one = object.__new__(PreferenceLoader)
    one.lengths, one.layout = np.array([100, 61, 40, 17]), RowLayout(2, 1, True, 4)
    assert one._waste([[[0, 3]], [[1, 2]]]) == {"padding": 1 - 218 / 240, "imbalance": 1 / 16}
