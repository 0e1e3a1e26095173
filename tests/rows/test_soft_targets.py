"""Soft targets in rows: whose token they are of, groups of ids, and records without any."""

import numpy as np
import pytest
import torch

from megatron_infifpo.methods import resolve
from megatron_infifpo.references.soft_targets import SoftTargets, SoftTargetStore
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.rows.soft_targets import collate_targets
from support.datasets import record, write_tokens
from support.soft_targets import write_soft_targets


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"), [record(i) for i in range(9)])


def opened(tokens, folder, name: str, **options) -> PreferenceDataset:
    method = resolve(name)
    prefix = write_soft_targets(tokens.prefix, folder / name, method, **options)
    return PreferenceDataset.for_method(method, tokens.prefix, None, soft_targets=prefix)


@pytest.mark.parametrize("order", [[0, 1, 2], [8, 3, 5], [4]])
def test_targets_are_of_their_tokens(tokens, tmp_path, order):
    data = opened(tokens, tmp_path, "fusellm")
    row = collate([data[i] for i in order])
    store, start, chunks = SoftTargetStore(tmp_path / "fusellm"), 0, 0
    for b, index in enumerate(order):
        length = int(tokens.scored_lengths[index, 0])
        wanted = store.take(index, 0, length)
        here = slice(start, start + length)
        assert (row["segment_ids"][here] == b).all()
        for name in ("ids", "probs", "tail", "sources"):
            assert np.array_equal(row[f"soft_{name}"][here].numpy(), getattr(wanted, name)), name
        for number, (first, end) in enumerate(wanted.chunks.tolist(), chunks):
            rows = row["chunk_rows"][row["chunk_of"] == number].tolist()
            assert rows == list(range(start + first, start + end))
            assert row["chunk_starts"][number] == start + first
        last = chunks + len(wanted.chunks)
        assert row["chunk_logps"][chunks:last].tolist() == wanted.chunk_logps.tolist()
        start, chunks = start + length, last
        if index == 8:
            assert not len(wanted.chunks) and (wanted.sources == 0).all(), "the last has none"
    assert start == len(row["soft_ids"]) and chunks == len(row["chunk_logps"])


def test_values_are_of_their_tokens(tokens, tmp_path):
    data = opened(tokens, tmp_path, "infifusion")
    row = collate([data[i] for i in (2, 8, 0)])
    lengths = [int(tokens.scored_lengths[i, 0]) for i in (2, 8, 0)]
    assert row["own_top"] == row["top_values"].shape[2] == 4
    first, last, _ = row["top_values"].split(lengths)
    assert last.isnan().all() and not first.isnan().all()
    expected = SoftTargetStore(tmp_path / "infifusion").take(2, 0, lengths[0]).values
    assert expected is not None and np.array_equal(first.numpy(), expected, equal_nan=True)


def test_groups_take_the_place_of_their_numbers():
    groups = [np.array([7, 8, 9]), np.array([3])]
    ids = np.array([[5, -2, -1], [-3, 6, -2], [-1, -1, -1], [1, 2, 4]], np.int32)
    none = np.zeros(0, np.float32)
    targets = SoftTargets(
        ids,
        np.zeros((4, 3), np.float32),
        np.ones(4, np.float32),
        np.zeros(4, np.uint8),
        np.zeros((0, 2), np.int32),
        none,
        none,
    )
    row = collate_targets([targets], groups)
    assert row["soft_ids"].tolist() == [
        [5, 7, 8, 9, -1],
        [3, 6, 7, 8, 9],
        [-1] * 5,
        [1, 2, 4, -1, -1],
    ]
    assert row["soft_buckets"].tolist() == [
        [0, 1, 1, 1, -1],
        [0, 1, 2, 2, 2],
        [-1] * 5,
        [0, 1, 2, -1, -1],
    ]
    alone = collate_targets([targets], None)
    assert "soft_buckets" not in alone and torch.equal(alone["soft_ids"], torch.from_numpy(ids))
