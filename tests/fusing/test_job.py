"""`infifpo fuse-targets`: from stores to soft targets, beside plain Python over texts."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing.coverage import ALL
from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SEVERAL, SoftTargetStore
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import CHATML, list_record
from support.fusing import RECORDS, K, Models, dense, write_top_k

LISTS = [list_record(i) for i in range(5)]


def by_hand(models: Models, name: str, index: int) -> list[dict[int, float]]:
    """A source's distributions over the pivot's ids, at tokens of the same place in the text.

    From decoded strings: no lengths, no maps of the package.
    """
    sides = []
    for chat in (models.chat["pivot"], models.chat[name]):
        ids = chat.encode(RECORDS[index]).response_ids[0].tolist()
        ends = [len(chat.tokenizer.decode(ids[: i + 1], skip_special_tokens=True))
                for i in range(len(ids))]  # fmt: skip
        sides.append(list(zip([0, *ends[:-1]], ends, strict=True)))
    texts = []
    for chat in (models.chat["pivot"], models.chat[name]):
        special = {*chat.tokenizer.all_special_ids} - {*chat.end_of_turn_ids}
        numbers = range(len(chat.tokenizer))
        texts.append(["" if i in special else chat.tokenizer.decode([i]) for i in numbers])
    stops = {models.chat[name].end_of_turn: models.chat["pivot"].end_of_turn}
    top = LogprobStore(models.folder / f"{name}-logps").top(index, 0)
    result = []
    for span in sides[0]:
        found: dict[int, float] = {}
        if span in sides[1]:
            row = sides[1].index(span)
            for number, logp in zip(top.ids[row].tolist(), top.logps[row].tolist(), strict=True):
                text = texts[1][number] if number < len(texts[1]) else ""
                text = stops.get(text, text)
                if text and "\ufffd" not in text and texts[0].count(text) == 1:
                    found[texts[0].index(text)] = math.exp(logp)
            found[-1] = 1 - sum(found.values())
        result.append(found)
    return result


@pytest.mark.parametrize("name", ["other", "bytes"])
def test_one_source_by_hand(models, name):
    """What tokens of the same place say, by decoded text."""
    store = models.fuse(f"hand-{name}", name, ambiguous="id")
    store.check_against(models.tokens)
    compared = 0
    for index in range(len(RECORDS)):
        targets = models.take(store, index)
        if LogprobStore(models.folder / f"{name}-logps").masked(index):
            assert not targets.sources.any() and (targets.tail == 1).all()
            continue
        for t, expected in enumerate(by_hand(models, name, index)):
            assert targets.sources[t] == bool(expected)
            rows = zip(targets.ids[t].tolist(), targets.probs[t].tolist(), strict=True)
            found = {i: p for i, p in rows if i != -1}
            tail = expected.pop(-1, 1.0)
            ascii_only = {i for i in found if i in expected}
            assert ascii_only == expected.keys()
            for i, p in expected.items():
                assert found[i] == pytest.approx(p, abs=1e-3)
            others = sum(p for i, p in found.items() if i not in expected)
            assert targets.tail[t] + others == pytest.approx(tail, abs=2e-3)
            compared += len(expected)
    assert compared > 50


def test_chunks_are_texts(models):
    """Chunks and rows cover all tokens; a chunk's log-prob is the sum of its source's tokens."""
    store = models.fuse("chunks", "bytes")
    source = LogprobStore(models.folder / "bytes-logps")
    for index in range(len(RECORDS)):
        targets = models.take(store, index)
        covered = (targets.sources > 0).astype(int)
        for first, end in targets.chunks:
            covered[first:end] += 1
        assert (covered == 1).all()
        # All of the text: rows' tokens are single bytes here, chunks the other ones.
        ids = models.tokens.record(index).response_ids[0]
        lengths = models.chat["pivot"].token_bytes.lengths[ids].astype(int)
        borders = np.concatenate([[0], np.cumsum(lengths)])
        values = source.logprobs(index, 0)
        for (first, end), logp in zip(targets.chunks, targets.chunk_logps, strict=True):
            assert end == first + 1  # by bytes every token is a chunk of its own
            expected = values[borders[first] : borders[end]].sum()
            assert logp == pytest.approx(expected, rel=1e-5)
        assert (targets.chunk_weights == 1).all()


@pytest.mark.parametrize("as_initial", [False, True])
def test_the_pivots_own_store(models, as_initial):
    """As the only source, or as the initial pivot alone: its own top k."""
    names = () if as_initial else ("pivot",)
    store = models.fuse(f"own-{as_initial}", *names, include_initial=as_initial)
    own, known = LogprobStore(models.folder / "pivot-logps"), models.chat["pivot"].token_bytes
    assert store.sources == (("initial",) if as_initial else ("pivot",))
    for index in range(len(RECORDS)):
        targets, top = models.take(store, index), own.top(index, 0)
        real = top.ids < len(known.pieces)  # no id of the padding
        assert not len(targets.chunks) and (targets.sources == 1).all()
        for t in range(len(top.ids)):
            assert targets.ids[t][real[t].sum() :].tolist() == [-1] * int((~real[t]).sum())
            found = dict(zip(targets.ids[t].tolist(), targets.probs[t].tolist(), strict=True))
            expected = np.exp(top.logps[t].astype(np.float64))
            for number, prob in zip(top.ids[t][real[t]], expected[real[t]], strict=True):
                assert found[number] == pytest.approx(prob, abs=1e-3)
        probs = np.where(real, np.exp(top.logps), 0)
        np.testing.assert_allclose(targets.probs.sum(1), probs.sum(1), atol=1e-3)
        np.testing.assert_allclose(targets.probs.sum(1) + targets.tail, 1, atol=1e-6)
        assert (targets.ids < len(known.pieces)).all()


def test_permuted_source(models, tmp_path):
    """Another order of a source's ids changes nothing."""
    chat = models.chat["bytes"]
    size = len(chat.tokenizer)
    order = np.random.default_rng(0).permutation(size)
    content = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {t: int(order[i]) for t, i in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = int(order[token["id"]])
    # The library wants added tokens at the end of a vocabulary, or within the model's.
    content["model"]["vocab"] |= {t["content"]: t["id"] for t in content["added_tokens"]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=CHATML, bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip
    other.save_pretrained(tmp_path / "tokenizer")
    permuted = ChatTokenizer.from_pretrained(tmp_path / "tokenizer")
    found = []
    for name, speaker, names in (("plain", chat, None), ("permuted", permuted, order)):
        teacher = dense(size, 9, k=K, order=names)
        write_top_k(models.folder / f"{name}-logps", RECORDS, speaker, teacher, vocab_size=size)
        found.append(models.fuse(name, name))
    assert found[0].fingerprint == found[1].fingerprint


def test_several_sources(models, capsys):
    """Mean of three by hand from single ones; the initial pivot is the last."""
    single = [models.fuse(f"s-{n}", n) for n in ("other", "bytes")]
    single.append(models.fuse("s-initial", include_initial=True))
    store = models.fuse("all", "other", "bytes", fusion="mean", include_initial=True, top_k=K)
    assert store.sources == ("other", "bytes", "initial")
    for index in range(len(RECORDS)):
        targets, parts = models.take(store, index), [models.take(s, index) for s in single]
        for t in range(len(targets.ids)):
            here = [p for p in parts if p.sources[t]]
            mass: Counter = Counter()
            for part in here:
                for i, p in zip(part.ids[t].tolist(), part.probs[t].tolist(), strict=True):
                    mass[i] += p / len(here)
            del mass[-1]
            expected = sorted(mass.values(), reverse=True)[:K]
            np.testing.assert_allclose(targets.probs[t][: len(expected)], expected, atol=2e-3)
            assert targets.sources[t] == (SEVERAL if len(here) > 1 else 3)
            assert abs(targets.probs[t].sum() + targets.tail[t] - 1) < 1e-6
        # Weights of a text's chunks are shares among the sources that take part.
        shares = set(np.round(targets.chunk_weights.astype(float), 5))
        assert shares <= {round(1 / 3, 5)} if index != 3 else shares <= {0.5}


def test_best_by_record(models):
    """MinCE takes the source with the fewest nats a byte, or a token of its own."""
    stores = {n: LogprobStore(models.folder / f"{n}-logps") for n in ("pivot", "other", "bytes")}
    winners = {}
    for ce_per in ("byte", "token"):
        store = models.fuse(f"best-{ce_per}", "other", "bytes", include_initial=True, ce_per=ce_per)
        for index in range(len(RECORDS)):
            nats = {}
            for name, own in stores.items():
                if not own.masked(index):
                    units = int(own.byte_lengths(index, 0).sum())
                    units = units if ce_per == "byte" else int(own.counts(index)[0])
                    nats[name] = -own.sums(index)[0] / units
            best = min(nats, key=nats.__getitem__)
            number = {"other": 1, "bytes": 2, "pivot": 3}[best]
            targets = models.take(store, index)
            assert set(targets.sources[targets.sources > 0].tolist()) <= {number}
            winners[ce_per, index] = best
        wins = Counter(winners[ce_per, i] for i in range(len(RECORDS)))
        table = store.manifest["coverage"][ALL]
        assert [table[s]["wins"] for s in store.sources] == [
            wins[n] for n in ("other", "bytes", "pivot")
        ]
    by_byte, by_token = ([winners[c, i] for i in range(len(RECORDS))] for c in ("byte", "token"))
    assert by_byte != by_token


def test_domains_and_masks(models, capsys):
    yaml = models.sources("other", "bytes", bytes=", domains: [code]")
    store = models.fuse("domains", yaml=yaml)
    assert store.manifest["masked"] == {
        "other": {"too long": 1}, "bytes": {"outside its domains": 4}
    }  # fmt: skip
    table = store.manifest["coverage"]
    assert set(table) == {"math", "code", ALL}
    assert table["math"]["bytes"]["responses"] == 0 and table["math"]["bytes"]["masked"] == 4
    assert table["math"]["bytes"]["comparable"] is None
    lengths = models.tokens.scored_lengths[:, 0]
    assert table[ALL]["other"]["tokens"] == lengths.sum() - lengths[3]
    row = table[ALL]["other"]
    assert row["mass"] + row["beyond_top_k"] + row["no_twin"] == pytest.approx(1, abs=1e-3)
    printed = capsys.readouterr().out
    assert "bytes: 4 responses masked: outside its domains" in printed
    assert f"{6 * K + 3} bytes a token" in printed
    assert "comparable" in printed and "nats/byte" in printed


def test_table_by_hand(models):
    """Shares of the table, counted again from the targets and the store."""
    store = models.fuse("table", "other")
    row = store.manifest["coverage"][ALL]["other"]
    own = LogprobStore(models.folder / "other-logps")
    rows, mass, nats, size = 0, 0.0, 0.0, 0
    for index in range(len(RECORDS)):
        if not own.masked(index):
            targets = models.take(store, index)
            rows += int((targets.sources > 0).sum())
            mass += float(targets.probs.sum())
            nats -= float(own.sums(index)[0])
            size += int(own.byte_lengths(index, 0).sum())
    assert row["comparable"] == pytest.approx(rows / row["tokens"])
    assert row["mass"] == pytest.approx(mass / rows, abs=1e-3)
    assert row["nats_per_byte"] == pytest.approx(nats / size, rel=1e-5)


def test_values(models):
    store = models.fuse("values", "other", "bytes", fusion="none", include_initial=True, top_k=3)
    assert store.manifest["ambiguous"] is None and store.groups is None
    own = LogprobStore(models.folder / "pivot-logps")
    for index in range(len(RECORDS)):
        values = models.take(store, index).values
        assert values.shape[1:] == (3, 3)
        np.testing.assert_array_equal(values[:, 2], own.top(index, 0).logps[:, :3])
        assert np.isnan(values[:, 0]).all() == (index == 3)


def test_groups(models):
    store = models.fuse("groups", "bytes", ambiguous="group")
    assert store.groups
    targets = [models.take(store, i) for i in range(len(RECORDS))]
    used = {int(i) for t in targets for i in t.ids[t.ids <= -2]}
    assert used and all(-(i + 2) < len(store.groups) for i in used)
    pieces = models.chat["pivot"].token_bytes.pieces
    for group in store.groups:  # by bytes: all that begins with one
        assert len({pieces[i][:1] for i in group.tolist()}) == 1
    plain = models.fuse("no-groups", "bytes")
    counts = [sum(int((models.take(s, i).sources > 0).sum()) for i in range(len(RECORDS)))
              for s in (store, plain)]  # fmt: skip
    assert counts[0] == models.tokens.scored_lengths[:, 0].sum() > counts[1]


def test_lists(models, tmp_path):
    """Of a list every response has targets."""
    chat, other = models.chat["pivot"], models.chat["bytes"]
    write_token_dataset(LISTS, chat, tmp_path / "lists")
    tokens, size = TokenDataset(tmp_path / "lists"), len(other.tokenizer)
    write_top_k(tmp_path / "source", LISTS, other, dense(size, 1, k=K), vocab_size=size)
    write_top_k(tmp_path / "first", LISTS, other, dense(size, 1, k=K), vocab_size=size,
                responses="chosen")  # fmt: skip
    for name in ("source", "first"):
        text = f"initial: none\nsources: [{{name: s, logprobs: {name}}}]\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    job = FusingJob(str(tmp_path / "lists"), str(tmp_path / "source.yaml"), str(tmp_path / "out"))
    fuse_targets(job)
    store = SoftTargetStore(tmp_path / "out")
    for index in range(len(LISTS)):
        for response, length in enumerate(tokens.scored_lengths[index].tolist()):
            assert store.take(index, response, length).sources.any() == (length > 0)
    bad = FusingJob(job.data, str(tmp_path / "first.yaml"), str(tmp_path / "out2"))
    with pytest.raises(UserError, match="first response alone"):
        fuse_targets(bad)
