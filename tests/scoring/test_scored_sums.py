"""Log-probs of scored tokens, from records to a data set, against a loop over transformers."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.rows.layout import PLAIN
from megatron_infifpo.scoring import merge
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.scoring.rows import Limits, prepare_shard
from megatron_infifpo.scoring.shards import write_shard
from megatron_infifpo.scoring.transformers_backend import TransformersBackend
from megatron_infifpo.storage.sharded_job import ShardedJob
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.tokenization import TokenizedRecord
from megatron_infifpo.tokens.writer import write_token_dataset
from support import tiny
from support.datasets import list_record, manifest_fields, record
from support.marks import VOCABULARY, Marking

DOMAINS = ["law" if i == 3 else "math" for i in range(30)]
RECORDS = {
    "pairs": [record(i, domain=d, pivot=True) for i, d in enumerate(DOMAINS)],
    "lists": [list_record(i, domain=d) for i, d in enumerate(DOMAINS)],
}
CHAT: Any = Marking({"r-4": "it has no tools"}, plain=("r-2",))
SIZE = 5  # records of a shard


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return TransformersBackend.load(tiny.save_model(folder, "qwen3", vocab_size=VOCABULARY + 4))


def score(backend, folder, limits, monkeypatch, records, **more) -> LogprobStore:
    """Score the records shard by shard, and merge the shards."""
    shards = ShardedJob(folder / "out", ".npz")
    shards.claim({})
    groups = [records[i : i + SIZE] for i in range(0, len(records), SIZE)]
    for number, group in enumerate(groups):
        shard = prepare_shard(
            number, group, CHAT, limits, vocab_size=VOCABULARY, row_tokens=70, layout=PLAIN
        )
        said = list(zip(shard.notes, shard.remarks, strict=True))
        with shards.writing(number) as file:
            write_shard(file, group, said, shard.unpack(backend(shard.rows)))
    monkeypatch.setattr(merge, "read_records", lambda *args: enumerate(groups))
    names = max((r.names for r in records), key=len)
    plan = manifest_fields(records) | {"count": len(records), "responses": list(names)}
    more |= {"shard_records": SIZE, "domains": limits.domains}
    job = ScoringJob("transformers", "x", ["x"], str(folder / "out"), **more)
    merge.merge(job, shards, CHAT, limits, plan)
    return LogprobStore(folder / "out")


@torch.no_grad()
def by_loop(backend, tokens: TokenizedRecord, room: int) -> list[np.ndarray]:
    """Log-probs of the scored tokens of each response, one text and one token at a time."""
    found = []
    for ids, mark in zip(
        tokens.response_ids, scored_marks(tokens.response_ids, tokens.scored), strict=True
    ):
        text = torch.from_numpy(np.concatenate([tokens.prompt_ids, ids])).long()[None]
        logprobs = backend.model(text, use_cache=False).logits[0].float().log_softmax(-1)
        first = len(tokens.prompt_ids)
        places = [t for t in range(first, min(text.shape[1], room)) if mark[t - first]]
        found.append(np.array([float(logprobs[t - 1, text[0, t]]) for t in places]))
    return found


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("context", [100, 9])
@pytest.mark.parametrize("kind", RECORDS)
def test_a_data_set_is_what_a_loop_finds(backend, tmp_path, monkeypatch, cut, context, kind):
    records = RECORDS[kind]
    store = score(backend, tmp_path, Limits(context, cut, ["math"]), monkeypatch, records)
    seen = {"whole": 0, "cut": 0, "too long": 0, "cut to nothing": 0}
    for i, r in enumerate(records):
        if r.id in CHAT.refused or r.domain == "law":
            refused = "the chat template refuses it: it has no tools"
            wanted = refused if r.id in CHAT.refused else "outside the domains math"
            assert store.masked(i) and store.note(i) == wanted
            continue
        tokens = CHAT.encode(r)
        longest = len(tokens.prompt_ids) + max(map(len, tokens.response_ids))
        expected = by_loop(backend, tokens, context)
        nothing = not all(map(len, expected))
        if longest > context and (not cut or nothing):
            seen["cut to nothing" if cut else "too long"] += 1
            assert (
                store.masked(i) and store.note(i) == f"longer than the context of {context} tokens"
            )
            continue
        seen["cut" if longest > context else "whole"] += 1
        note = f"responses cut to the context of {context} tokens"
        assert store.note(i) == (note if longest > context else None)
        lacks = [0] * (len(store.responses) - len(expected))
        assert store.counts(i).tolist() == [*map(len, expected), *lacks]
        assert store.remarks(i) == ([] if tokens.scored is None else ["marked"])
        for n, values in enumerate(expected):
            np.testing.assert_allclose(store.logprobs(i, n), values, atol=2e-5)
            assert store.sums(i)[n] == pytest.approx(values.sum(), abs=1e-4)
    assert seen["whole"] and (context == 100 or sum(map(bool, seen.values())) == 2 + cut)
    notes = store.manifest["note_counts"]
    assert (
        notes["outside the domains math"] == notes["the chat template refuses it: it has no tools"]
    )
    example = store.manifest["example"]
    first = records[0].names[0]
    assert set(example) == {"id", "prompt", first, f"{first}_not_scored"}
    if context == 100:  # as the pivot's, it fits the tokens of the same tokenizer
        write_token_dataset(records, CHAT, tmp_path / "t", on_refused="mask")
        store.manifest["tokenizer"] = CHAT.describe()
        store.check_against(TokenDataset(tmp_path / "t"), same_tokenizer=True)


def test_no_record_can_be_scored(backend, tmp_path, monkeypatch):
    expected = "scored: 28 longer than the context of 1 tokens; 1 outside the domains math; 1 the"
    with pytest.raises(UserError, match=expected):
        score(backend, tmp_path, Limits(1, False, ["math"]), monkeypatch, RECORDS["pairs"])


def test_a_source_may_have_no_record(backend, tmp_path, monkeypatch):
    """Of its domains, where the job says so; that nothing else can be scored is a mistake still."""
    more: dict[str, Any] = {"records": RECORDS["lists"], "absent_domains": "mask"}
    store = score(backend, tmp_path / "art", Limits(100, False, ["art"]), monkeypatch, **more)
    assert store.masked_records.all()
    assert store.manifest["note_counts"] == {"outside the domains art": 30}
    with pytest.raises(UserError, match="no record can be scored: 28 longer than the context"):
        score(backend, tmp_path / "math", Limits(1, False, ["math"]), monkeypatch, **more)
