"""Response tokens that are not scored: in files, in rows, in log-probs, in losses."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.checks.data import Check, attempt
from megatron_infifpo.errors import UserError
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.notes import OTHERS, Notes
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import encode_or_refuse
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import record, write_scores
from support.marks import Marking

RECORDS = [record(i, domain=("math", "code")[i % 2]) for i in range(12)]
REFUSED = {"r-0": "it has no tools", "r-5": "no systems", "r-6": "no systems"}
CHAT: Any = Marking(REFUSED, plain=("r-2", "r-3"))


@pytest.fixture
def tokens(tmp_path):
    write_token_dataset(RECORDS, CHAT, tmp_path / "t", on_refused="mask")
    return TokenDataset(tmp_path / "t")


def test_marks_and_masked_records_read_back(tokens):
    assert len(tokens) == 12
    for i, r in enumerate(RECORDS):
        found = tokens.record(i)
        assert tokens.ids(i) == r.id and tokens.domain(i) == r.domain
        if r.id in REFUSED:
            assert tokens.note(i) == f"the chat template refuses it: {REFUSED[r.id]}"
            assert tokens.masked_records[i] and not tokens.scored_lengths[i].any()
            assert not len(found.prompt_ids) and not any(map(len, found.response_ids))
            continue
        expected = CHAT.encode(r)
        assert tokens.note(i) is None and not tokens.masked_records[i]
        assert np.array_equal(found.prompt_ids, expected.prompt_ids)
        pairs = (found.scored or (None, None), expected.scored or (None, None))
        for n, (mark, wanted) in enumerate(zip(*pairs, strict=True)):
            assert np.array_equal(found.response_ids[n], expected.response_ids[n])
            assert found.response_ids[n].dtype == np.int32
            whole = np.ones(len(expected.response_ids[n]), np.bool_)
            assert np.array_equal(
                whole if mark is None else mark, whole if wanted is None else wanted
            )
            count = len(whole) if wanted is None else wanted.sum()
            assert tokens.scored_lengths[i, n] == count
            assert tokens.response_lengths[i, n] == len(whole)
    counts = tokens.manifest["note_counts"]
    assert counts == {
        "the chat template refuses it: it has no tools": 1,
        "the chat template refuses it: no systems": 2,
    }
    assert tokens.manifest["notes"]["the chat template refuses it: no systems"] == "5-6"
    assert tokens.manifest["remark_counts"] == {"marked": 7}
    assert tokens.remarks(1) == ["marked"] and not tokens.remarks(2) and not tokens.remarks(0)


def test_the_fingerprint_of_tokens_covers_marks(tmp_path, tokens):
    def fingerprint(chat):
        written = write_token_dataset(RECORDS, chat, tmp_path / "other", on_refused="mask")
        assert written["records_sha256"] == tokens.records_sha256
        return written["tokens_sha256"]

    assert fingerprint(CHAT) == tokens.manifest["tokens_sha256"]
    found = {fingerprint(Marking(REFUSED, plain=plain)) for plain in ((), ("r-2",), ("r-3",))}
    assert len(found | {tokens.manifest["tokens_sha256"]}) == 4


def test_refused_records_stop_by_default_and_never_fill_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"'r-0' .*it has no tools; --on-bad-record skip keeps"):
        write_token_dataset(RECORDS, CHAT, tmp_path / "t")
    bad = [r for r in RECORDS if r.id in REFUSED]
    with pytest.raises(UserError, match="none of the 3 records .*: 1 the .* no tools; 2 the chat"):
        write_token_dataset(bad, CHAT, tmp_path / "t", on_refused="mask")
    assert not list(tmp_path.iterdir())


class Given(ChatTokenizer):
    """A tokenizer that gives what it was given."""

    def __init__(self, *found):
        self.found = found

    def encode_batch(self, records):
        return list(self.found)


def test_what_has_no_mean_is_refused():
    ids, none = np.array([1, 2], np.int32), np.array([], np.int32)
    both, neither = np.array([True, True]), np.array([False, False])
    found = encode_or_refuse(
        RECORDS[:4],
        Given(
            TokenizedRecord(ids, (ids, ids), (both, neither)),
            TokenizedRecord(none, (ids, ids)),
            TokenizedRecord(ids, (none, ids)),
            TokenizedRecord(ids, (ids, ids)),
        ),
    )
    assert found[0] == "no token of 'rejected' is scored"
    assert "nothing predicts the first token" in str(found[1])
    assert found[2] == "no token of 'chosen' is scored"
    assert isinstance(found[3], TokenizedRecord)


def test_a_refused_record_costs_its_neighbours_nothing():
    calls = []

    class Counting(Marking):
        def encode_batch(self, records):
            calls.append(len(records))
            return super().encode_batch(records)

    many = [record(i) for i in range(256)]
    chat: Any = Counting({"r-77": "no"})
    found = encode_or_refuse(many, chat)
    assert [i for i, x in enumerate(found) if isinstance(x, str)] == [77]
    assert len(calls) == 17  # two halves of each half that holds it
    for r, tokens in zip(many, found, strict=True):
        if not isinstance(tokens, str):
            assert np.array_equal(tokens.prompt_ids, Marking().encode(r).prompt_ids)


def test_a_manifest_never_holds_a_million_texts():
    notes = Notes()
    for i in range(1000):
        notes.add(i, f"reason {i}")
    counts = notes.counts()
    assert len(counts) == 101 and counts[OTHERS] == 900 and sum(counts.values()) == 1000


def flip(path, position):
    values = np.memmap(path, np.int32, "r+")
    values[position] = ~values[position]
    values.flush()


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def scored(folder, edit):
    array = np.load(folder / "t_scored.npy")
    np.save(folder / "t_scored.npy", edit(array))


def minus(row, by):
    def edit(array):
        array[row] -= by
        return array

    return edit


DAMAGE = {
    "a token of a prompt": (lambda f: flip(f / "t.bin", 0), "record 'r-1' has .* scored tokens in"),
    "a token of a response": (lambda f: flip(f / "t.bin", -1), "record 'r-11' has .* scored token"),
    "a mark": (lambda f: scored(f, minus((2, 0), 1)), "record 'r-2' has .* expected"),
    "too many marks": (lambda f: scored(f, minus((2, 0), -99)), "disagree about responses"),
    "a negative mark": (lambda f: scored(f, minus((0, 0), 1)), "disagree about responses"),
    "no mark": (lambda f: scored(f, lambda a: a * (np.arange(24).reshape(12, 2) != 4)),
                "'r-2' has a prompt or a response without a scored token"),
    "no marks of a record": (lambda f: scored(f, lambda a: a * (np.arange(12) != 2)[:, None]),
                             "'r-2' has a prompt or"),
    "shape": (lambda f: scored(f, lambda a: a[1:]), r"holds int32 \[11, 2\], expected"),
    "type": (lambda f: scored(f, lambda a: a.astype(float)), "holds float64"),
    "no file": (lambda f: (f / "t_scored.npy").unlink(), "cannot read .*t_scored.npy"),
    "notes": (lambda f: change(f / "t.json", notes={"x": "0,5"}), "notes about other records"),
    "far notes": (lambda f: change(f / "t.json", notes={"x": "0-99"}), "about record 99 of 12"),
    "no notes": (lambda f: change(f / "t.json", notes={"x": 3}), "are no records"),
    "version": (lambda f: change(f / "t.json", version=2), "version 2, expected 3; write the"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, tokens, name):
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        found = TokenDataset(tmp_path / "t")
        for i in range(len(found)):
            found.record(i)


def test_masked_records_are_left_out_of_training(tmp_path, tokens):
    dataset = PreferenceDataset(tmp_path / "t")
    kept = [i for i, r in enumerate(RECORDS) if r.id not in REFUSED]
    assert dataset.eligible(10**6).tolist() == kept and dataset.eligible(3).size == 0
    assert dataset.left_out(10**6) == {"the chat template refuses them": 3}
    assert dataset.left_out(3) == {
        "the chat template refuses them": 3,
        "longer than --seq-length 3": 9,
    }
    shortest = int(dataset.segment_lengths[kept].min())
    with pytest.raises(UserError, match=rf"is left \(3 the .*\): the shortest needs {shortest} "):
        dataset.require_eligible(3)


def test_log_probs_are_of_the_scored_tokens(tmp_path, tokens):
    lengths, masked = tokens.scored_lengths, (0, 5, 6)
    write_scores(tmp_path / "good", RECORDS, lengths, masked=masked)
    LogprobStore(tmp_path / "good").check_against(tokens, same_tokenizer=False)
    write_scores(tmp_path / "all", RECORDS, tokens.response_lengths, masked=masked)

    def check(name: str) -> Check:
        store = LogprobStore(tmp_path / name)
        store.manifest["tokenizer"] = tokens.manifest["tokenizer"]
        check = store.check_against
        return attempt(name, lambda: check(tokens, same_tokenizer=True) or "fits")

    assert check("good").note == "fits"
    first = int((lengths != tokens.response_lengths).any(axis=1).argmax())
    expected = f"'r-{first}' are {tokens.response_lengths[first].tolist()} scored tokens, expected"
    assert expected in (check("all").error or "")
