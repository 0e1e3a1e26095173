"""SentencePiece's tokenizers as pivots and as sources: blanks before texts, byte fallback."""

import numpy as np
import pytest

from megatron_infifpo.fusing.coverage import ALL
from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.fusing.vocabulary import Vocabulary, map_vocabulary
from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import byte_tokenizer
from support.fusing import K, dense, toy, write_top_k
from support.sentencepieces import BARE, KINDS, sentencepiece

TEXTS = ("the sea is la", "is 12, or thank", " a lead", "the end\n", "12 is 1é2")
RECORDS = [
    PreferenceRecord(f"r-{i}", "general", ({"role": "user", "content": "why?"},),
                     (reply(text), reply(f"no {i}")))
    for i, text in enumerate(TEXTS)
]  # fmt: skip


def chat(folder, kind):
    made = byte_tokenizer(BARE) if kind == "bytes" else sentencepiece(kind, BARE)
    made.save_pretrained(folder / kind)
    return ChatTokenizer.from_pretrained(folder / kind)


def fused(folder, pivot, source):
    """Coverage of all, and the targets of every record's chosen response."""
    here, there = chat(folder, pivot), chat(folder, source)
    write_token_dataset(RECORDS, here, folder / "data")
    size = len(there.token_bytes.pieces)
    write_top_k(folder / "source", RECORDS, there, dense(size, 0, k=K), vocab_size=size)
    (folder / "s.yaml").write_text("initial: none\nsources: [{name: s, logprobs: source}]\n")
    fuse_targets(FusingJob(str(folder / "data"), str(folder / "s.yaml"), str(folder / "out")))
    store, tokens = SoftTargetStore(folder / "out"), TokenDataset(folder / "data")
    lengths = tokens.scored_lengths[:, 0].tolist()
    found = [store.take(i, 0, n) for i, n in enumerate(lengths)]
    return store.manifest["coverage"][ALL]["s"], found, here, tokens


def left_out(chat: ChatTokenizer, ids: list[int], text: str) -> np.ndarray:
    """Which tokens have white space at an end where the blank makes the text another one."""
    joined = chat.token_bytes.join(ids)
    if joined == text.encode():
        return np.zeros(len(ids), bool)
    lengths = chat.token_bytes.lengths[ids].astype(int)
    ends = np.cumsum(lengths)
    lead, end = len(joined) - len(joined.lstrip()), len(joined.rstrip())
    return (ends - lengths < lead) | (ends > end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_pivot", [True, False])
def test_every_text_is_read(tmp_path, kind, as_pivot):
    """No source is masked, and rows and chunks cover every token but those with blanks of no text,
    and then white space at the end."""
    pivot, source = (kind, "bytes") if as_pivot else ("bytes", kind)
    row, found, here, tokens = fused(tmp_path, pivot, source)
    assert row["masked"] == 0 and row["comparable"] > 0.15
    blanks = 0
    for index, targets in enumerate(found):
        covered = (targets.sources > 0).astype(int)
        for first, end in targets.chunks:
            covered[first:end] += 1
        ids = tokens.record(index).response_ids[0].tolist()
        assert covered.tolist() == (~left_out(here, ids, TEXTS[index])).astype(int).tolist()
        assert targets.sources[-1] == covered[-1]  # the end of turn
        for t in np.flatnonzero(targets.sources).tolist():
            # From bytes, or to bytes: a row's token is one byte, or special.
            assert len(here.token_bytes.pieces[ids[t]]) <= 1
        blanks += here.token_bytes.join(ids) != TEXTS[index].encode()
    assert blanks == 0 or (as_pivot and kind in ("llama", "first", "always"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_as_a_source(tmp_path, kind):
    """All tokens are rows but those at a blank of no text, and then white space at the end."""
    row, found, here, tokens = fused(tmp_path, kind, kind)
    assert row["masked"] == 0
    if kind not in ("llama", "always"):
        assert row["comparable"] == 1
        return
    for index, targets in enumerate(found):
        ids = tokens.record(index).response_ids[0].tolist()
        out = left_out(here, ids, TEXTS[index])
        assert np.array_equal(targets.sources == 0, out) and not len(targets.chunks)
        assert out[0] or TEXTS[index].startswith(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers(tmp_path, kind):
    """Digits that the source splits are found whatever it writes before a text."""
    source = Vocabulary.of(chat(tmp_path, kind))
    pivot = toy([*"abcdefghijklmnopqrstuvwxyz ,.?", "1", "2", "12", "21", "the", " the", "\n"])
    twins, default = (map_vocabulary(source, pivot, 0, mode).ids for mode in ("id", "digits"))
    changed = {source.pieces[i] for i in np.flatnonzero(twins != default).tolist()}
    assert changed == {b"1", b"2"}
    assert (default[twins != default] == -1).all()
    # Bytes of fallback have the twins that letters have.
    fallback = [i for i, piece in enumerate(source.pieces) if piece == b"a"]
    assert len(fallback) == 2 and set(twins[fallback].tolist()) == {0}
