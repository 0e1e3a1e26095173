"""Log-probs of others, of lists of responses."""

from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.imported import import_tokens
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.published import import_published
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import byte_tokenizer, write_jsonl, write_tokens

LISTS = [
    {"id": "a", "prompt": "q", "responses": ["yes", "no", "maybe"], "scores": [1, 2, 3]},
    {"id": "b", "prompt": "q", "responses": ["so", "or so"], "finish_reasons": ["stop", "length"]},
    {"id": "n", "prompt": "q", "answers": [{"answer": "1", "rank": 1}, {"answer": "2", "rank": 2}]},
]


@pytest.fixture
def job(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", *LISTS)
    records, chat = read_records(path, lists=True), ChatTokenizer(byte_tokenizer())
    rng, lines = np.random.default_rng(0), []
    for record in records:
        tokens, entries = chat.encode(record), []
        for number, ids in enumerate(tokens.response_ids):
            values = (-rng.random(len(ids))).tolist()
            there = [*tokens.prompt_ids.tolist(), *ids.tolist()]
            pairs = zip(there[-len(ids) :], values, strict=True)
            vllm = [None, *[{"1": {"logprob": -9.0}, str(t): {"logprob": -8.0}} for t in there[1:]]]
            vllm[-len(ids) :] = [{str(t): {"logprob": v}} for t, v in pairs]
            entries.append(values if number else {"prompt_logprobs": vllm})
        lines.append({"id": record.id, "responses": entries})

    def run(*given: Any, **options: Any) -> LogprobStore:
        logprobs = write_jsonl(tmp_path / "lp.jsonl", *given)
        options = {"name": "m", "tokenizer": chat, "lists": True, **options}
        import_tokens([str(path)], [str(logprobs)], str(tmp_path / "out"), **options)
        return LogprobStore(tmp_path / "out")

    return run, records, lines


def test_an_entry_a_response(tmp_path, job):
    run, records, lines = job
    store = run(*reversed(lines))
    assert store.responses == ("response_0", "response_1", "response_2") and store.listed
    store.check_against(write_tokens(tmp_path, records), same_tokenizer=True)
    for i, record in enumerate(records):
        for number in range(len(record.responses)):
            entry = lines[i]["responses"][number]
            if number == 0:
                count = int(store.counts(i)[0])
                entry = [
                    v["logprob"] for p in entry["prompt_logprobs"][-count:] for v in p.values()
                ]
            scored = entry[:-1] if record.id == "b" and number == 1 else entry  # it was cut
            assert store.logprobs(i, number).tolist() == np.array(scored, np.float32).tolist()
        assert not store.counts(i)[len(record.responses) :].any()


BROKEN = {
    "few": ({"responses": [[-1.0]]}, "'responses' of record 'a' is a list of 1, expected a list "
            "with one entry for each of its 3 responses"),
    "none": ({"responses": None}, "'responses' of record 'a' is null"),
    "a pair's": ({"responses": None, "chosen": [-1.0]}, "'responses' of record 'a' is null"),
    "nothing of one": ({"responses": [[-1.0], None, [-1.0]]}, "'response_0' of record 'a' has 1 "),
    "wrong length": (
        {"responses": [[-1.0] * 4, [-1.0] * 9, [-1.0] * 6]}, "'response_1' of record 'a' has 9 "
    ),
    "no numbers": (
        {"responses": [[-1.0] * 4, "x", [-1.0]]}, "'response_1' of record 'a' is missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_entries_that_do_not_fit(tmp_path, job, name):
    run, _, lines = job
    change, message = BROKEN[name]
    with pytest.raises(UserError, match=rf"lp.jsonl:1: {message}"):
        run(lines[0] | change, *lines[1:])
    assert not list(tmp_path.glob("out*"))


def test_without_the_flag_kinds_do_not_go_together(job):
    run, _, lines = job
    with pytest.raises(
        UserError, match="r.jsonl:3: found a pair although the first record is a li"
    ):
        run(*lines, lists=False)


def test_the_papers_form_has_no_lists(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", *LISTS[:1])
    with pytest.raises(
        UserError, match="p.jsonl:1: record 'a' is a list of responses, expected a p"
    ):
        import_published([str(path)], [], tmp_path / "out")
