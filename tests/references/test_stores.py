import json
import os
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import records_fingerprint
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.summary import print_summary
from megatron_infifpo.storage.notes import format_ranges, parse_ranges
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import byte_tokenizer, manifest_fields, record, write_scores, write_tokens

RECORDS = [record(i, domain=("math", "code", "ça")[i % 3]) for i in range(7)]


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path, RECORDS)


def test_tokens_read_back(tokens):
    chat = ChatTokenizer(byte_tokenizer())
    assert len(tokens) == 7 and tokens.responses == ("chosen", "rejected")
    assert tokens.domains == ("math", "code", "ça")
    assert tokens.records_sha256 == records_fingerprint(RECORDS)
    assert tokens.manifest["tokenizer"] == chat.describe()
    for i, wanted in enumerate(RECORDS):
        assert tokens.ids(i) == wanted.id and tokens.domain(i) == wanted.domain
        assert tokens.find(wanted.id) == i
        encoded = chat.encode(wanted)
        assert np.array_equal(tokens.prompt_ids(i), encoded.prompt_ids)
        assert tokens.prompt_lengths[i] == len(encoded.prompt_ids)
        for r, ids in enumerate(tokens.response_ids(i)):
            assert ids.dtype == np.int32 and ids.flags.writeable
            assert np.array_equal(ids, encoded.response_ids[r])
            assert tokens.response_lengths[i, r] == len(ids)
    assert tokens.find("r-77") is None and tokens.find("") is None and tokens.find("r") is None


def test_arrays_outlive_the_dataset(tmp_path, tokens):
    # Megatron unmaps its file when the dataset goes; a view into it would then crash the process.
    wanted = tokens.prompt_ids(0).tolist()
    ids = TokenDataset(tokens.prefix).prompt_ids(0)
    lengths = TokenDataset(tokens.prefix).response_lengths
    assert ids.tolist() == wanted and lengths.sum() == tokens.response_lengths.sum()


def test_three_responses_and_a_mixture(tmp_path):
    three = write_tokens(tmp_path, [record(i, pivot=True) for i in range(3)])
    assert three.responses == ("chosen", "rejected", "pivot_chosen")
    assert three.response_lengths.shape == (3, 3)
    with pytest.raises(UserError, match="'r-2' has the responses chosen, rejected, pivot"):
        write_tokens(tmp_path, [record(1), record(2, pivot=True)], "mixed")
    with pytest.raises(UserError, match="no records"):
        write_tokens(tmp_path, [], "none")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("mixed", "none"))]


def test_an_interrupted_write_leaves_no_dataset(tmp_path, tokens):
    def interrupted():
        yield RECORDS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_dataset(interrupted(), ChatTokenizer(byte_tokenizer()), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
    with pytest.raises(KeyboardInterrupt):  # an older dataset of the name stays whole
        write_token_dataset(interrupted(), ChatTokenizer(byte_tokenizer()), tokens.prefix)
    assert len(TokenDataset(tokens.prefix)) == 7


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "no manifest": (lambda p: p("json").unlink(), "manifest .* is missing"),
    "broken manifest": (lambda p: cut(p("json"), 9), "manifest .* is broken"),
    "other format": (lambda p: edit(p("json"), format="x"), "says format 'x', expected"),
    "other version": (
        lambda p: edit(p("json"), version=9),
        "says version 9, expected 3.* prefix that the chat template never",
    ),
    "other count": (
        lambda p: edit(p("json"), count=9),
        r"holds 7 records, expected 9|holds float64 \[7, 2\], expected float64 \[9, 2\]",
    ),
    "no bin": (lambda p: p("bin").unlink(), r"\.bin is missing"),
    "no idx": (lambda p: p("idx").unlink(), r"\.idx is missing"),
    "cut bin": (lambda p: cut(p("bin"), 40), r"\.bin has 40 bytes, expected \d+"),
    "empty bin": (lambda p: cut(p("bin"), 0), r"\.bin has 0 bytes, expected \d+"),
    "cut idx": (lambda p: cut(p("idx"), 60), r"\.idx has 60 bytes, expected \d+"),
    "no idx header": (lambda p: cut(p("idx"), 9), "is not an index"),
}


@pytest.mark.parametrize("kind", ["tokens", "scores"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, tokens, kind, name):
    write_scores(tmp_path / "scores", RECORDS, tokens.response_lengths)
    opener: Any = {"tokens": TokenDataset, "scores": LogprobStore}[kind]
    damage, message = DAMAGE[name]
    damage(lambda end: tmp_path / f"{kind}.{end}")
    with pytest.raises(UserError, match=message):
        dataset = opener(tmp_path / kind)
        dataset.logprobs(0, 0)  # only then are a log-prob dataset's values opened


def test_damage_of_ids_and_domains(tmp_path, tokens):
    cut(tmp_path / "tokens_domains.npy", 50)
    with pytest.raises(UserError, match="cannot read .*tokens_domains.npy"):
        TokenDataset(tmp_path / "tokens")
    np.save(tmp_path / "tokens_domains.npy", np.zeros(3, np.uint16))
    with pytest.raises(UserError, match=r"tokens_domains\.npy holds 3 records, expected 7"):
        TokenDataset(tmp_path / "tokens")
    (tmp_path / "tokens_ids.idx").unlink()
    with pytest.raises(UserError, match=r"tokens_ids\.idx is missing"):
        TokenDataset(tmp_path / "tokens")


def test_the_two_kinds_are_not_confused(tmp_path, tokens):
    write_scores(tmp_path / "scores", RECORDS, tokens.response_lengths)
    with pytest.raises(UserError, match="expected 'megatron_infifpo token dataset'"):
        TokenDataset(tmp_path / "scores")
    with pytest.raises(UserError, match="expected 'megatron_infifpo log-prob dataset'"):
        LogprobStore(tokens.prefix)
    for end in ("bin", "idx"):
        (tmp_path / f"scores.{end}").write_bytes((tmp_path / f"tokens.{end}").read_bytes())
    with pytest.raises(UserError, match="holds int32 values, expected float32"):
        LogprobStore(tmp_path / "scores").logprobs(0, 0)
    edit(tmp_path / "tokens.json", responses=["chosen", "rejected", "pivot_chosen"])
    with pytest.raises(UserError, match="documents of other than 4 sequences"):
        TokenDataset(tmp_path / "tokens")


def test_scores_read_back(tmp_path):
    rng = np.random.default_rng(1)
    rows = [[-rng.random(n, dtype=np.float32) for n in (3, 5 + i)] for i in range(4)]
    with LogprobWriter(
        tmp_path / "s", responses=("chosen", "rejected"), manifest=manifest_fields(RECORDS[:6])
    ) as writer:
        for i, row in enumerate(rows):
            writer.add(f"r-{i}", row)
        writer.mask("r-4", "longer than 9 tokens")
        writer.add("r-5", [np.array([1e-7, -2.0]), np.array([-0.0])], note="cut")  # rounding
        assert not list(tmp_path.glob("s.json"))
    store = LogprobStore(tmp_path / "s")
    assert len(store) == 6 and store.manifest["model"] == "m"
    for i, row in enumerate(rows):
        assert store.sums(i).dtype == np.float64
        np.testing.assert_allclose(store.sums(i), [r.astype(float).sum() for r in row], rtol=1e-12)
        assert store.counts(i).tolist() == [3, 5 + i]
        assert not store.masked(i) and store.note(i) is None
        for r, values in enumerate(row):
            assert np.array_equal(store.logprobs(i, r), values)
    assert store.masked(4) and store.note(4) == "longer than 9 tokens"
    assert not store.masked(5) and store.note(5) == "cut"
    assert store.sums(4).tolist() == [0, 0] and store.counts(4).tolist() == [0, 0]
    assert store.logprobs(4, 1).size == 0
    assert store.sums(5).tolist() == [-2.0, 0.0] and store.masked_records.tolist() == [
        False
    ] * 4 + [
        True,
        False,
    ]


def test_the_summary_says_what_becomes_of_each_domain(tmp_path, capsys):
    """Whose texts are too long for the model, say: two of three in math, one of two in code."""
    with LogprobWriter(
        tmp_path / "s", responses=("chosen", "rejected"), manifest=manifest_fields(RECORDS)
    ) as writer:
        for i, r in enumerate(RECORDS):
            if i in (0, 3, 4):
                writer.mask(r.id, "longer than the context of 9 tokens")
            else:
                row, note = [np.full(2, -1.0), np.full(3, -2.0)], "cut" if i == 6 else None
                writer.add(r.id, row, note=note, remarks=["odd"] if i < 3 else [])
    print_summary(LogprobStore(tmp_path / "s"), [r.domain for r in RECORDS])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:6]] == [
        ["code", "2", "1", "5", "-1.600", "100.0%"],
        ["math", "3", "2", "5", "-1.600", "100.0%"],
        ["ça", "2", "0", "10", "-1.600", "100.0%"],
    ]
    assert lines[7:] == [
        "note on 3 records: longer than the context of 9 tokens (math 2 of 3, code 1 of 2)",
        "note on 1 records: cut (math 1 of 3)",
        "remark on 2 records: odd (code 1 of 2, ça 1 of 2)",
    ]


def test_sums_alone(tmp_path, tokens):
    """Imported log-probs may have no values; training does not need them."""
    write_scores(tmp_path / "s", RECORDS, tokens.response_lengths)  # is replaced
    with LogprobWriter(
        tmp_path / "s", responses=("chosen", "rejected"), manifest=manifest_fields(RECORDS),
        values=False,
    ) as writer:  # fmt: skip
        for r in RECORDS[:6]:
            writer.add_sums(r.id, [-3.5, -1.0], [7, 2])
        writer.mask("r-6", "why not")
    store = LogprobStore(tmp_path / "s")
    assert store.sums(2).tolist() == [-3.5, -1.0] and store.counts(2).tolist() == [7, 2]
    assert store.masked(6) and not store.has_values
    assert not list(tmp_path.glob("s.[bi]*")), "values of the replaced dataset must go"
    with pytest.raises(UserError, match="sums and counts only"):
        store.logprobs(0, 0)
    for sums, counts, expected in (([-1.0, 0.5], [1, 1], "0.5 .* 'rejected'"),
                                   ([-1.0, -1.0], [0, 1], "0 tokens in 'chosen'")):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            with LogprobWriter(
                tmp_path / "t", responses=("chosen", "rejected"),
                manifest=manifest_fields(RECORDS), values=False,
            ) as writer:  # fmt: skip
                writer.add_sums("r-0", sums, counts)
    assert not list(tmp_path.glob("t[._]*"))


def test_values_and_counts_must_agree(tmp_path, tokens):
    write_scores(tmp_path / "a", RECORDS, tokens.response_lengths)
    write_scores(tmp_path / "b", RECORDS, tokens.response_lengths + 1)
    (tmp_path / "a_counts.npy").write_bytes((tmp_path / "b_counts.npy").read_bytes())
    with pytest.raises(UserError, match="disagree about the number of tokens"):
        LogprobStore(tmp_path / "a").logprobs(0, 0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no npy", "shape", "dtype"])
def test_a_damaged_summary(tmp_path, tokens, damage):
    write_scores(tmp_path / "s", RECORDS, tokens.response_lengths)
    path = tmp_path / "s_sums.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "no npy":
        path.write_bytes(b"not numpy" * 30)
    else:
        array = np.load(path)
        np.save(path, array[:-1] if damage == "shape" else array.astype(np.float32))
    with pytest.raises(UserError, match=r"s_sums.npy .*; write it again with infifpo score"):
        LogprobStore(tmp_path / "s")


@pytest.mark.parametrize("indices", [[], [0], [3, 4], [0, 1, 2, 7, 9, 10]])
def test_ranges(indices):
    assert {i for r in parse_ranges(format_ranges(indices)) for i in r} == set(indices)


def test_a_store_may_be_masked_whole(tmp_path, tokens):
    write_scores(tmp_path / "s", RECORDS, tokens.response_lengths, masked=range(7))
    store = LogprobStore(tmp_path / "s")
    assert store.masked_records.all() and store.sums(3).tolist() == [0, 0]
    store.check_against(tokens, same_tokenizer=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.01])
def test_impossible_values_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"record 'r-1': log-prob .* at token 1 of 'rejected'"):
        with LogprobWriter(
            tmp_path / "s", responses=("chosen", "rejected"), manifest=manifest_fields(RECORDS)
        ) as writer:
            writer.add("r-0", [np.array([-1.0]), np.array([-1.0])])
            writer.add("r-1", [np.array([-1.0]), np.array([-1.0, value])])
    assert not list(tmp_path.iterdir())


def test_misuse_of_the_writer(tmp_path):
    fields = manifest_fields(RECORDS)
    with pytest.raises(ValueError, match="lacks backend"):
        incomplete = {k: v for k, v in fields.items() if k != "backend"}
        LogprobWriter(tmp_path / "s", responses=("chosen", "rejected"), manifest=incomplete)
    writer = LogprobWriter(tmp_path / "s", responses=("chosen", "rejected"), manifest=fields)
    one = np.array([-1.0])
    for logprobs in ([one], [one, one[:0]], [one, one[None]]):
        with pytest.raises(ValueError, match="record 'a'"):
            writer.add("a", logprobs)
    with pytest.raises(ValueError, match="for no reason"):
        writer.mask("a", "")
    with pytest.raises(UserError, match="no records"):
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_scores_must_fit_the_tokens(tmp_path, tokens):
    lengths = tokens.response_lengths

    def check(name, *, same=True, records=RECORDS, lengths=lengths, **options):
        write_scores(tmp_path / name, records, lengths, **options)
        LogprobStore(tmp_path / name).check_against(tokens, same_tokenizer=same)

    described = manifest_fields(RECORDS)["tokenizer"]
    check("good", masked=[2])
    check("source", lengths=lengths + 3, same=False)
    with pytest.raises(UserError, match="the count is 6 records, expected 7"):
        check("short", records=RECORDS[:6], lengths=lengths[:6])
    swapped = [RECORDS[1], RECORDS[0], *RECORDS[2:]]
    with pytest.raises(UserError, match="fingerprint of the records .* other records"):
        check("swapped", records=swapped, same=False)
    for name in ("tokenizer_sha256", "chat_template_sha256"):
        with pytest.raises(UserError, match=f"its {name} is xx"):
            check(name, tokenizer=described | {name: "x" * 64})
        check(f"{name} of a source", same=False, tokenizer=described | {name: "x" * 64})
        check(f"{name} unknown", tokenizer=described | {name: None})
    check("imported", same=False, tokenizer=described | {"score": None})
    with pytest.raises(UserError, match="by --score all, the token dataset is of --score last"):
        check("score", same=False, tokenizer=described | {"score": "all"})
    longer = lengths.copy()
    longer[3, 1] += 1
    message = rf"lengths .* record 'r-3' are .*{longer[3, 1]}\] scored tokens, .*\(1 such records\)"
    with pytest.raises(UserError, match=message):
        check("longer", lengths=longer)
    three = np.pad(lengths, ((0, 0), (0, 1)), constant_values=1)
    with pytest.raises(UserError, match="its responses are .*pivot_chosen"):
        check("three", lengths=three, same=False)
