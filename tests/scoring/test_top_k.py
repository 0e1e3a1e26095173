"""The most probable tokens that scoring keeps: their numbers, layouts, resuming, bytes of texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_infifpo.records.records import PreferenceRecord, read_records, reply
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.top_k import FILES, text_identity
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.scoring.rows import Limits
from megatron_infifpo.scoring.size import EvenSample, in_words, scored_tokens, size_line
from megatron_infifpo.scoring.top_k import TopKeeper
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import tiny
from support.datasets import CHATML, byte_tokenizer
from support.launcher import RankError, refused
from support.sentencepieces import BARE, KINDS, sentencepiece

K = 16
PLAIN = (".bin", ".idx", "_sums.npy", "_counts.npy")
LAYOUTS = {  # name -> ranks, backend, flags
    "megatron": (1, "megatron", []),
    "transformers": (1, "transformers", []),
    "dp2": (2, "megatron", []),
    "tp2": (2, "megatron", ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, "megatron", ["--pipeline-model-parallel-size", "2"]),
    "tp2-pp2": (
        4,
        "megatron",
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    ),
    "cp2": (2, "megatron", ["--context-parallel-size", "2", "--max-row-tokens", "100"]),
    "transformers-tp2": (2, "transformers", ["--tensor-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A vocabulary of 307 ids, a prime, so that every TP pads it; 300 of them are the tokenizer's.

    Initialised so that rounding is not amplified, and far enough from uniform to have an order.
    """
    return tiny.save_model(
        tmp_path_factory.mktemp("model") / "m", "qwen2", vocab_size=307, initializer_range=0.1
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Eighteen records, of half of which only the end is scored."""
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    return tiny.add_turns(tiny.write_records(path, 18))


@pytest.fixture(scope="module")
def score(model, records, ranks, tmp_path_factory):
    """Score the records in some layout; returns the prefix."""
    folder = tmp_path_factory.mktemp("scored")

    def run(name: str, layout: str, *more: str) -> Path:
        world, backend, flags = LAYOUTS[layout]
        argv = ["--backend", backend, "--model", str(model), "--input", str(records)]
        argv += ["--output", str(folder / name), "--name", "m", "--shard-records", "5"]
        argv += ["--micro-batch-tokens", "300", *flags, *more]
        if not (folder / f"{name}.json").exists():
            ranks(world, "support.scoring:score", argv)
        return folder / name

    return run


@pytest.fixture(scope="module")
def expected(model, records) -> dict:
    """(record, response) -> scored token ids and their whole rows in float64, by a plain loop."""
    network = AutoModelForCausalLM.from_pretrained(model).double()
    chat, found = ChatTokenizer.from_pretrained(model), {}
    for i, tokens in enumerate(chat.encode_batch(read_records([records]))):
        marks = scored_marks(tokens.response_ids, tokens.scored)
        for r, (ids, mark) in enumerate(zip(tokens.response_ids, marks, strict=True)):
            whole = torch.tensor(np.concatenate([tokens.prompt_ids, ids])).long()
            with torch.no_grad():
                rows = network(whole[None]).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            found[i, r] = ids[mark], rows.numpy()[mark]
    return found


def responses(store: LogprobStore) -> Iterator[tuple[int, int]]:
    return ((i, r) for i in range(len(store)) for r in range(len(store.responses)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_a_plain_loop(score, expected, layout):
    """Ids exact, but those as probable as each other in float32; log-probs as float16 has them."""
    store = LogprobStore(score(layout, layout, "--top-k", str(K)))
    assert store.top_k == K
    assert store.manifest["top_k"]["vocab_size"] == 307
    assert {(i, r) for i, r in responses(store)} == set(expected)
    swapped = total = 0
    for place, (ids, rows) in expected.items():
        top, order = store.top(*place), np.argsort(-rows, axis=1)[:, :K]
        assert top.ids.shape == top.logps.shape == (len(ids), K)
        best = np.take_along_axis(rows, order, axis=1)
        swapped, total = swapped + int((top.ids != order).sum()), total + order.size
        # Where an id differs, it is as probable: by its own row, and not by its place.
        np.testing.assert_allclose(np.take_along_axis(rows, top.ids, 1), best, atol=3e-5)
        assert np.abs(top.logps / best - 1).max() <= 4.9e-4 + 1e-5
        left = np.log1p(-np.exp(best).sum(axis=1))
        assert np.abs(top.tail / left - 1).max() <= 4.9e-4 + 1e-4
        mass = np.exp(top.logps).sum(axis=1) + np.exp(top.tail)
        np.testing.assert_allclose(mass, 1, atol=1e-3)
    assert total > 15_000 and swapped <= 3  # none, where this was written


@pytest.mark.parametrize("layout", ["megatron", "transformers"])
def test_observed_tokens_among_the_most_probable(score, expected, layout):
    store = LogprobStore(score(layout, layout, "--top-k", str(K)))
    seen = 0
    for place, (ids, _) in expected.items():
        top, logprobs = store.top(*place), store.logprobs(*place)
        rows, columns = np.nonzero(top.ids == ids[:, None])
        np.testing.assert_allclose(top.logps[rows, columns], logprobs[rows], rtol=4.9e-4)
        others = np.setdiff1d(np.arange(len(ids)), rows)
        assert (logprobs[others] <= top.logps[others, -1] + 5e-3).all()
        seen += len(rows)
    assert seen > 50


@pytest.mark.parametrize("layout", ["megatron", "transformers"])
def test_without_it_nothing_changes(score, layout):
    """The other files are the same bytes, and the manifest but for one field."""
    with_top, without = score(layout, layout, "--top-k", str(K)), score(f"{layout}-0", layout)
    for suffix in PLAIN:
        a, b = (Path(f"{prefix}{suffix}").read_bytes() for prefix in (with_top, without))
        assert a == b, suffix
    more, less = (json.loads(Path(f"{p}.json").read_text()) for p in (with_top, without))
    assert more.pop("top_k") and more == less
    names = {path.name for path in without.parent.glob(f"{without.name}[._]*")}
    assert names == {f"{without.name}{suffix}" for suffix in (*PLAIN, ".json")}


def test_data_parallel_and_chosen(score):
    """The same bytes on two ranks; of the chosen responses alone, what they have otherwise."""
    whole, both = (score(name, name, "--top-k", str(K)) for name in ("megatron", "dp2"))
    for suffix in FILES:
        assert Path(f"{whole}{suffix}").read_bytes() == Path(f"{both}{suffix}").read_bytes()
    chosen = ("--top-k", str(K), "--top-k-responses", "chosen")
    every, some = LogprobStore(whole), LogprobStore(score("chosen", "megatron", *chosen))
    assert some.manifest["top_k"] == every.manifest["top_k"] | {"responses": "chosen"}
    np.testing.assert_array_equal(some.texts, every.texts)
    for i, r in responses(every):
        np.testing.assert_array_equal(some.byte_lengths(i, r), every.byte_lengths(i, r))
        for a, b in zip(some.top(i, r), every.top(i, r), strict=True):
            np.testing.assert_array_equal(a, b if r == 0 else b[:0])


@pytest.mark.parametrize("turns", [False, True])
def test_bytes_of_what_was_scored(score, records, turns):
    """They add up to the reply, or to its last turn, whose end of turn has none."""
    store = LogprobStore(score("megatron", "megatron", "--top-k", str(K)))
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for i, r in responses(store):
        text = lines[i][("chosen", "rejected", "pivot_chosen")[r]]
        if isinstance(text, list) != turns:
            continue
        scored = (text[-1]["content"] if turns else text).encode()
        lengths = store.byte_lengths(i, r)
        assert len(lengths) == store.counts(i)[r] and lengths.sum() == len(scored)
        assert lengths[-1] == 0 and (lengths[:-1] > 0).all()
        assert tuple(store.texts[i, r]) == text_identity(scored)


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("template", [CHATML, BARE])
@pytest.mark.parametrize("text", ["the thanks", " a blank", "  two", "Zürich 🙂", "x\n"])
def test_no_blank_before_the_text(kind, template, text):
    """One that a tokenizer writes before a reply is not its first token's."""
    hf = byte_tokenizer(template) if kind == "bytes" else sentencepiece(kind, template)
    chat = ChatTokenizer(hf)
    messages = ({"role": "user", "content": "why?"},)
    record = PreferenceRecord("r", "general", messages, (reply(text), reply("no")))
    tokens = chat.encode(record)
    (lengths, identity), _ = TopKeeper(K, "all", chat).texts(record, tokens)
    assert identity == text_identity(text.encode())
    assert len(lengths) == len(tokens.response_ids[0])
    assert lengths.sum() == len(text.encode()) and lengths.dtype == np.uint16
    # That there is a blank to take away.
    joined = chat.token_bytes.join(tokens.response_ids[0].tolist())
    writes = kind == "llama" or kind == "always" and text[0] != " "
    assert (joined != text.encode()) == (template == BARE and writes)


def test_killed_and_resumed(score, model, records, ranks, tmp_path):
    """Shards that an earlier run has finished are joined as if nothing had happened."""
    argv = ["--backend", "megatron", "--model", str(model), "--input", str(records), "--name", "m"]
    argv += ["--output", str(tmp_path / "o"), "--shard-records", "5", "--micro-batch-tokens"]
    argv += ["300", "--top-k", str(K)]
    with pytest.raises(RankError):
        ranks(1, "support.broken:score_until_killed", argv, 0, "merging", 0.0)
    shards = sorted((tmp_path / "o.shards").glob("0*.npz"))
    assert len(shards) == 4
    shards[1].unlink()
    sentence = refused(ranks, "tools/score_source.py", [*argv[:-1], "8"])
    assert "holds shards of another job: its k is 16, this one's is 8" in sentence
    ranks(2, "support.scoring:score", argv)
    for suffix in (*PLAIN, ".json", *FILES):
        a, b = (Path(f"{p}{suffix}") for p in (tmp_path / "o", score("megatron", "megatron")))
        assert a.read_bytes() == b.read_bytes(), suffix
    ranks(1, "support.scoring:score", argv)
    assert "is complete already" in ranks.logs[0]
    sentence = refused(ranks, "tools/score_source.py", [*argv[:-1], "8"])
    assert "is of another job: its k is 16, this one's is 8" in sentence


def test_masked_records_and_the_closing_table(setup, ranks, tmp_path):
    """Domains that are not scored have no mass to speak of; shards without a scored record."""
    argv = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(setup.records)]
    argv += ["--output", str(tmp_path / "o"), "--domains", "code", "--top-k", "320"]
    ranks(1, "support.scoring:score", [*argv, "--shard-records", "2"])
    log = ranks.logs[0]
    store = LogprobStore(tmp_path / "o")
    scored = np.flatnonzero(~store.masked_records).tolist()
    assert 0 < len(scored) < len(store)
    # All of the vocabulary is kept: nothing is left, as far as float32 can tell.
    for i in scored:
        assert (np.sort(store.top(i, 0).ids, axis=1) == np.arange(320)).all()
        assert np.exp(store.top(i, 0).tail).max() < 2e-6
    lines = {line.split()[0]: line for line in log.splitlines() if "%" in line}
    assert lines["code"].endswith("100.0%") and lines["all"].endswith("100.0%")
    assert next(line for line in log.splitlines() if line.startswith("general")).endswith("-")
    # Of twenty records all are sampled: what is printed is what is written.
    size = sum((tmp_path / f"o_topk_{name}.bin").stat().st_size for name in ("ids", "logps"))
    assert f"top-320 of 20 records: about {in_words(size)} in " in log


def test_how_large_it_gets(model, records):
    """Each response counts, or the chosen one; a hint where that matters."""
    chat, found = ChatTokenizer.from_pretrained(model), read_records([records])
    tokens = scored_tokens(found, chat, Limits(512), 3)
    assert tokens.shape == (18, 3) and (tokens > 0).all()
    assert (scored_tokens(found, chat, Limits(512, domains=["law"]), 3) == 0).all()
    names = ("chosen", "rejected", "pivot_chosen")
    job: dict[str, Any] = {"backend": "megatron", "model": "m", "input": ["r"], "top_k": 16}
    job["output"] = "lp/m"
    even = np.full((5, 3), 100)
    assert size_line(ScoringJob(**job), names, 100_000, even) == (
        "top-16 of 100,000 records: about 2.9 GB in lp/m_topk_*, and as much in its shards until "
        "they are joined (--top-k-responses chosen: 980.0 MB)"
    )
    line = size_line(ScoringJob(**job, top_k_responses="chosen"), names, 100_000, even)
    assert "980.0 MB" in line and "(" not in line
    assert "(" not in size_line(ScoringJob(**job), ("response_0", "response_1"), 9, even)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 1000])
def test_an_even_sample(count):
    sample = EvenSample(8)
    for number in range(count):
        sample.add(PreferenceRecord(str(number), "", (), ()))
    found = [int(record.id) for record in sample.records]
    assert min(count, 4) <= len(found) <= 8
    assert len(set(np.diff(found))) <= 1 and found == sorted(found)
    assert not found or (found[0] == 0 and count - found[-1] <= max(1, count // 4))


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--top-k", "321"], "--top-k is 321, but "),
        (["--top-k", "4", "--top-k-responses", "chosen", "--lists"], "no meaning for lists"),
        (["--top-k-responses", "chosen"], "--top-k-responses has no effect without --top-k"),
    ],
)
def test_what_cannot_be(setup, ranks, tmp_path, more, expected):
    job = setup.lists if "--lists" in more else setup
    argv = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(job.records)]
    argv += ["--output", str(tmp_path / "o"), *more]
    assert expected in refused(ranks, "tools/score_source.py", argv)
    assert not list(tmp_path.iterdir())
