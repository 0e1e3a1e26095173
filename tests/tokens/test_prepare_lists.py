"""Lists through the commands: prepared, scored, split, and read again by their manifests."""

import json
import math

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import read_records, records_fingerprint
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.completing import Answers, Wanted, to_line
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.tokens.dataset import TokenDataset
from support import tiny
from support.datasets import write_jsonl
from support.tools import run_tool

NECTAR = {
    "id": "nectar", "domain": "math", "prompt": "\n\nHuman: big cats?\n\nAssistant:",
    "answers": [{"answer": "x", "rank": 2}, {"answer": "2", "rank": 1}, {"answer": "3", "rank": 7}],
}  # fmt: skip
ULTRA = {
    "id": "ultra", "instruction": "two dogs?",
    "completions": [{"response": "b", "overall_score": 4.5}, {"response": "a", "overall_score": 5}],
}  # fmt: skip
MIXED = {"id": "mixed", "prompt": "so?", "responses": ["a", "b"], "scores": [None, 0.25]}


def sampled() -> dict:
    given = [Response("a cat"), Response("a dog and", "length"), Response("a", reasoning="so")]
    prompt = Prompt("sampled", "math", ({"role": "user", "content": "what?"},), {})
    return to_line(prompt, Answers(given), Wanted(4, keep_cut=True), "m")


@pytest.fixture
def files(tmp_path):
    tiny.save_model(tmp_path / "model", "qwen3", vocab_size=300)
    tiny.save_tokenizer(tmp_path / "model", 300)
    return tmp_path, write_jsonl(tmp_path / "lists.jsonl", NECTAR, ULTRA, MIXED, sampled())


def run(name, *words):
    run_tool(name, list(map(str, words)))


def test_rated_and_sampled_lists_are_prepared(files, capsys):
    folder, path = files
    records = read_records(path, lists=True)
    run("prepare_preferences", "--lists", "--input", path, "--tokenizer", folder / "model",
        "--output", folder / "t")  # fmt: skip
    printed = capsys.readouterr()
    assert "\nscores: 6 of 10 responses\n" in printed.out and "rated" not in printed.err
    tokens = TokenDataset(folder / "t")
    assert tokens.listed and tokens.responses == ("response_0", "response_1", "response_2")
    assert tokens.records_sha256 == records_fingerprint(records)
    nan = math.nan
    expected = [[-2, -1, -7], [4.5, 5, nan], [nan, 0.25, nan], [nan] * 3]
    assert tokens.scores is not None
    np.testing.assert_array_equal(tokens.scores, np.array(expected))
    present = [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert (tokens.response_lengths > 0).tolist() == np.array(present, bool).tolist()
    lacks = tokens.response_lengths - tokens.scored_lengths
    assert lacks.tolist() == [[0] * 3, [0] * 3, [0] * 3, [0, 1, 0]], "the end of turn of one is cut"
    assert tokens.remarks(3) == [
        "the end of turn of a response that was cut is not scored",
        "the template leaves out the reasoning of a reply",
    ]


def test_without_the_flag_rated_responses_are_a_pair(files, capsys):
    folder, _ = files
    path = write_jsonl(folder / "rated.jsonl", NECTAR, ULTRA)
    for name, flags in (("pairs", []), ("lists", ["--lists"])):
        words = "--input", path, "--tokenizer", folder / "model", "--output", folder / name
        run("prepare_preferences", *flags, *words)
        printed = capsys.readouterr()
        assert ("\nscores: 5 of 5 responses\n" in printed.out) == bool(flags)
        assert ("1 record with more than two rated" in printed.err) != bool(flags)
    pairs, lists = (TokenDataset(folder / name) for name in ("pairs", "lists"))
    assert pairs.responses == ("chosen", "rejected") and not pairs.listed and pairs.scores is None
    of_lists = lists.response_ids(0)
    for ids, place in zip(pairs.response_ids(0), (1, 2), strict=True):
        assert ids.tolist() == of_lists[place].tolist()
    mixed = "--input", folder / "lists.jsonl", "--tokenizer", folder / "model"
    with pytest.raises(UserError, match=r"lists.jsonl:3: found a list although .*\(--lists reads"):
        run("prepare_preferences", *mixed, "--output", folder / "none")


def test_lists_are_scored_and_split(files):
    folder, path = files
    words = "--backend", "transformers", "--model", folder / "model", "--input"
    run("score_source", *words, path, "--lists", "--output", folder / "s", "--shard-records", 2)
    run("prepare_preferences", "--lists", "--input", path, "--tokenizer", folder / "model",
        "--output", folder / "t")  # fmt: skip
    store = LogprobStore(folder / "s")
    store.check_against(TokenDataset(folder / "t"), same_tokenizer=True)
    # Written as lists, they need the flag no more; the numbers are those of the same records.
    parts = folder / "a.jsonl", folder / "b.jsonl"
    run("split_preferences", "--lists", "--input", path, "--sft", parts[0], "--preference",
        parts[1], "--seed", 1)  # fmt: skip
    written = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert {line["id"] for line in written} == {"nectar", "ultra", "mixed", "sampled"}
    assert all("responses" in line for line in written)
    order = {line["id"]: line for line in written}
    names = ("nectar", "ultra", "mixed", "sampled")
    again = write_jsonl(folder / "again.jsonl", *(order[name] for name in names))
    run("score_source", *words, again, "--output", folder / "again")
    found = LogprobStore(folder / "again")
    assert found.manifest["records_sha256"] == store.manifest["records_sha256"]
    for i in range(len(store)):
        np.testing.assert_allclose(found.sums(i), store.sums(i), atol=1e-5)
        assert found.counts(i).tolist() == store.counts(i).tolist()
