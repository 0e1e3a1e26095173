"""The most probable tokens beside a log-prob dataset: packing, writing, reading, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import response_names
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.top_k import (
    FILES,
    TEXT,
    Packed,
    pack_logps,
    text_identity,
    unpack_logps,
)
from support.datasets import list_record, manifest_fields, record

K, V = 4, 50


def fields(responses: str = "all") -> dict:
    common = {"k": K, "temperature": 1.0, "vocab_size": V, "end_of_turn_ids": [7]}
    return common | {"responses": responses}


def distributions(length: int, seed: int, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of random rows: ids and float32 log-probs, [L, k]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(length, V)) * 4
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logps, axis=1)[:, :k]
    return ids.astype(np.int32), np.take_along_axis(logps, ids, 1).astype(np.float32)


def packed(length: int, seed: int, *, kept: bool = True) -> Packed:
    ids, logps = distributions(length, seed)
    lengths = np.arange(length, dtype=np.uint16)
    if not kept:
        ids, logps = ids[:0], logps[:0]
    return Packed(ids, pack_logps(logps), lengths, text_identity(b" %d\n" % seed))


def write(prefix: Path, lengths: np.ndarray, *, responses: str = "all", masked=()) -> list:
    """A dataset of these lengths [N, R], 0 of what a list lacks; returns what was added."""
    listed = lengths.shape[1] > 2
    records = [list_record(i) if listed else record(i) for i in range(len(lengths))]
    names = response_names(lengths.shape[1], listed=listed)
    added: list = []
    manifest, top_k = manifest_fields(records), fields(responses)
    with LogprobWriter(prefix, responses=names, manifest=manifest, top_k=top_k) as writer:
        for i, row in enumerate(lengths):
            if i in masked:
                writer.mask(f"r-{i}", "too long")
                added.append([])
                continue
            top = [
                packed(n, 10 * i + r, kept=responses == "all" or r == 0)
                for r, n in enumerate(row)
                if n
            ]
            writer.add(f"r-{i}", [np.full(n, -0.5, np.float32) for n in row if n], top=top)
            added.append(top)
    return added


@pytest.mark.parametrize("responses", ["all", "chosen"])
def test_round_trip(tmp_path, responses):
    """What is read is what was added; masked records and responses that are left out are empty."""
    lengths = np.random.default_rng(0).integers(1, 9, size=(6, 2))
    added = write(tmp_path / "s", lengths, responses=responses, masked=[2])
    store = LogprobStore(tmp_path / "s")
    assert store.top_k == K and store.manifest["top_k"] == fields(responses)
    assert store.texts.dtype == TEXT and store.texts.shape == (6, 2)
    for i in range(6):
        for r in range(2):
            top, lengths_of_bytes = store.top(i, r), store.byte_lengths(i, r)
            if i == 2:
                assert [len(part) for part in (*top, lengths_of_bytes)] == [0] * 4
                assert tuple(store.texts[i, r]) == (0, 0, 0, 0)
                continue
            entry = added[i][r]
            logps, tail = unpack_logps(entry.logps)
            for found, expected in zip(top, (entry.ids, logps, tail), strict=True):
                np.testing.assert_array_equal(found, expected)
                assert found.dtype == (np.int32 if expected is entry.ids else np.float32)
            assert len(top.ids) == (lengths[i, r] if responses == "all" or r == 0 else 0)
            np.testing.assert_array_equal(lengths_of_bytes, entry.lengths)
            assert tuple(store.texts[i, r]) == entry.text
    store.logprobs(0, 0)


def test_lists_of_unequal_length(tmp_path):
    lengths = np.array([[3, 2, 4], [5, 1, 0], [2, 2, 0], [1, 1, 1]])
    added = write(tmp_path / "s", lengths, masked=[3])
    store = LogprobStore(tmp_path / "s")
    np.testing.assert_array_equal(store.top(1, 0).ids, added[1][0].ids)
    np.testing.assert_array_equal(store.top(2, 1).ids, added[2][1].ids)
    assert tuple(store.texts[1, 2]) == (0, 0, 0, 0)


def test_float16_of_log_probs():
    """Relative error at most 2 ** -11; the mass of the k and the tail is 1 within 1e-3."""
    _, logps = distributions(500, 3)
    held, tail = unpack_logps(pack_logps(logps))
    assert np.abs(held / logps - 1).max() <= 2**-11
    exact = np.log1p(-np.exp(logps.astype(np.float64)).sum(1))
    assert np.abs(tail / exact - 1).max() <= 2**-11 + 1e-6
    np.testing.assert_allclose(np.exp(held).sum(1) + np.exp(tail), 1, atol=1e-3)


def test_what_float16_can_hold():
    """Small probabilities keep their logarithms; only a tail of nothing is infinite."""
    logps = np.array([[-1e-8, -20.0, -1e6, -np.inf]], np.float32)
    held, tail = unpack_logps(pack_logps(logps))
    assert held[0, 1] == -20 and np.isfinite(held).all() and held.min() == -65504
    assert tail[0] == pytest.approx(np.log(1e-8 - np.exp(-20)), rel=1e-3)
    held, tail = unpack_logps(pack_logps(np.array([[-1e-3]], np.float32)))
    assert tail[0] == pytest.approx(np.log(-np.expm1(-1e-3)), rel=2**-11)
    held, tail = unpack_logps(pack_logps(np.array([[3e-7]], np.float32)))  # a 1, rounded up
    assert held[0, 0] == 0 and np.isneginf(tail[0])


@pytest.mark.parametrize(
    "content, inner, lead, trail",
    [
        (b"yes", b"yes", 0, 0),
        (b" \nyes no\t ", b"yes no", 2, 2),
        (b"", b"", 0, 0),
        (b"  \n", b"", 3, 0),
        ("\u00a0yes\u2003".encode(), "\u00a0yes\u2003".encode(), 0, 0),  # not ASCII
        (b"\xe6\x97", b"\xe6\x97", 0, 0),  # cut within a character
    ],
)
def test_identity_of_a_text(content, inner, lead, trail):
    whole, bare, *ends = text_identity(content)
    assert ends == [lead, trail]
    assert bare == text_identity(inner)[0] and (whole == bare) == (content == inner)
    assert whole != text_identity(content + b".")[0]
    assert np.array([(whole, bare, *ends)], TEXT)["whole"][0] == whole


def test_a_dataset_without(tmp_path):
    """It has no such files, and says what to do; those of an older one of its name go."""
    write(tmp_path / "s", np.full((3, 2), 4))
    assert all((tmp_path / f"s{name}").exists() for name in FILES)
    records = [record(i) for i in range(2)]
    names = ("chosen", "rejected")
    with LogprobWriter(tmp_path / "s", responses=names, manifest=manifest_fields(records)) as new:
        for each in records:
            new.add(each.id, [np.full(2, -1, np.float32)] * 2)
    assert not list(tmp_path.glob("s_topk*")) and not list(tmp_path.glob("s_[bt]*"))
    store = LogprobStore(tmp_path / "s")
    assert store.top_k is None and "top_k" not in store.manifest
    for call in (
        lambda: store.top(0, 0),
        lambda: store.byte_lengths(0, 0),
        lambda: store.texts,
    ):
        with pytest.raises(UserError, match="score its records again with infifpo score --top-k"):
            call()


def test_bad_numbers_are_refused(tmp_path):
    given: dict[str, Any] = {"responses": ("chosen", "rejected"), "top_k": fields()}
    given["manifest"] = manifest_fields([record(0)])
    logprobs, good = [np.full(3, -0.5, np.float32)] * 2, packed(3, 0)
    ids, logps = distributions(3, 0)
    for bad in (np.nan, 0.25):
        wrong = logps.copy()
        wrong[1, 0] = bad
        writer = LogprobWriter(tmp_path / "s", **given)
        with pytest.raises(UserError, match="'r-0': a log-prob of its 4 most probable"):
            writer.add("r-0", logprobs, top=[good, good._replace(logps=pack_logps(wrong))])
        writer.discard()
    writer = LogprobWriter(tmp_path / "s", **given)
    for top in ([], [good], [good, packed(2, 0)], [good, good._replace(ids=ids[:, :2])]):
        with pytest.raises(ValueError, match="expected"):
            writer.add("r-0", logprobs, top=top)
    writer.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_broken_files(tmp_path, name):
    """Opening looks at none of them; the first look at one that is broken is a sentence."""
    write(tmp_path / "s", np.full((4, 2), 3))
    path = tmp_path / f"s{name}"
    for content in (None, path.read_bytes()[:-5]):
        path.unlink() if content is None else path.write_bytes(content)
        store = LogprobStore(tmp_path / "s")
        with pytest.raises(UserError):
            store.top(0, 0), store.byte_lengths(0, 0), store.texts


def test_files_of_another_dataset(tmp_path):
    write(tmp_path / "s", np.full((4, 2), 3))
    write(tmp_path / "t", np.full((4, 2), 2))
    for end in (".bin", ".idx"):
        (tmp_path / f"t_bytes{end}").rename(tmp_path / f"s_bytes{end}")
    with pytest.raises(UserError, match="s_bytes.idx and .*s_counts.npy disagree"):
        LogprobStore(tmp_path / "s").byte_lengths(0, 0)
    manifest = json.loads((tmp_path / "s.json").read_text())
    for bad in ({**manifest["top_k"], "k": "4"}, {"k": 4}, 4, fields() | {"k": 0}):
        (tmp_path / "s.json").write_text(json.dumps(manifest | {"top_k": bad}))
        with pytest.raises(UserError, match="top_k.*write it again"):
            LogprobStore(tmp_path / "s")
