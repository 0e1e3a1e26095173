"""Log-probs of others: the paper's records, lists of numbers, vLLM's prompt_logprobs."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.imported import import_tokens
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.published import import_published
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import byte_tokenizer, record, write_jsonl, write_tokens
from support.marks import Marking

# The numbers of the example in the paper's repository, of 241 and 283 tokens.
PUBLISHED: dict[str, Any] = {
    "ref_chosen_logps": -16.809629440307617,
    "ref_mean_chosen_logps": -0.06974949687719345,
    "ref_rejected_logps": -35.141197204589844,
    "ref_mean_rejected_logps": -0.13944919407367706,
    "fuse_chosen_logps": [-67.31946563720703, -74.1878662109375, -104.12448120117188],
    "fuse_mean_chosen_logps": [-0.2378779649734497, -0.2621479332447052, -0.3679310381412506],
    "fuse_rejected_logps": [-75.14492797851562, -78.72958374023438, -99.033447265625],
    "fuse_mean_rejected_logps": [-0.25559499859809875, -0.2677876949310303, -0.3368484675884247],
}


def published(**changes):
    """A record in TRL's conversational form with the paper's fields."""
    user = {"role": "user", "content": "Estimate the probability of germination."}
    texts = {"chosen": "It is 0.95.", "rejected": "It is 0.59."}
    conversations = {
        name: [user, {"role": "assistant", "content": text}] for name, text in texts.items()
    }
    return conversations | PUBLISHED | changes


def test_the_papers_own_example(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", published(), published(id="b", domain="math"))
    import_published([str(path)], ["qwen", "mistral", "gemma"], tmp_path / "out")
    config = read_sources(tmp_path / "out" / "sources.yaml")
    assert [source.name for source in config.sources] == ["qwen", "mistral", "gemma"]
    initial = LogprobStore(config.initial)
    assert initial.counts(0).tolist() == [241, 252] and not initial.has_values
    assert initial.sums(0).tolist() == [
        PUBLISHED["ref_chosen_logps"],
        PUBLISHED["ref_rejected_logps"],
    ]
    for column, source in enumerate(config.sources):
        store = LogprobStore(source.logprobs)
        assert store.manifest["backend"] == "imported" and store.manifest["weights_sha256"] is None
        for r, response in enumerate(("chosen", "rejected")):
            assert store.sums(1)[r] == PUBLISHED[f"fuse_{response}_logps"][column]
            mean = store.sums(1)[r] / store.counts(1)[r]
            assert mean == pytest.approx(PUBLISHED[f"fuse_mean_{response}_logps"][column], 1e-6)


def test_imported_sources_join_the_pivots_tokens(tmp_path):
    """Sources from elsewhere, the initial pivot scored here: what training opens."""
    path = write_jsonl(tmp_path / "p.jsonl", published(), published(id="b"))
    import_published([str(path)], [], tmp_path)
    tokens = write_tokens(tmp_path, read_records(path))
    config = read_sources(tmp_path / "sources.yaml")
    assert [source.name for source in config.sources] == ["source1", "source2", "source3"]
    expected = r"lengths .* are \[241, 252\].*score the pivot with infifpo score"
    with pytest.raises(UserError, match=expected):
        PreferenceDataset(tokens.prefix, config)  # the example's text is longer than this one
    own = {
        "ref_chosen_logps": -12.0, "ref_mean_chosen_logps": -1.0,
        "ref_rejected_logps": -6.0, "ref_mean_rejected_logps": -0.5,
    }  # fmt: skip
    path = write_jsonl(tmp_path / "p.jsonl", published(**own), published(id="b", **own))
    import_published([str(path)], [], tmp_path / "again")
    config = read_sources(tmp_path / "again" / "sources.yaml")
    pair = PreferenceDataset(tokens.prefix, config)[1]
    assert pair.values is not None
    assert pair.values.initial_sum_logps.tolist() == [-12, -6]
    assert pair.values.source_token_counts.tolist() == [[283] * 3, [294] * 3]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"ref_chosen_logps": None}, "field 'ref_chosen_logps' is None, expected a number"),
        ({"fuse_chosen_logps": ["x", -1.0, -1.0]}, "expected a list of numbers"),
        ({"fuse_chosen_logps": [-67.3, -74.2]}, "2 sums and 3 means of 'chosen'"),
        ({"ref_mean_chosen_logps": -0.0707}, "whole number of tokens, not 237"),
        ({"ref_mean_chosen_logps": 0.0}, "whole number of tokens, not nan"),
        ({"ref_chosen_logps": 16.8, "ref_mean_chosen_logps": 0.0697}, "16.8"),
        (
            {
                "fuse_chosen_logps": [-2.0], "fuse_mean_chosen_logps": [-1.0],
                "fuse_rejected_logps": [-2.0], "fuse_mean_rejected_logps": [-1.0],
            },
            "has 1 sources, the first record has 3",
        ),
        ({"fuse_rejected_logps": [-2.0], "fuse_mean_rejected_logps": [-1.0]}, "3 sources for"),
    ],
)  # fmt: skip
def test_published_records_that_do_not_fit(tmp_path, changes, expected):
    path = write_jsonl(tmp_path / "p.jsonl", published(), published(id="b", **changes))
    with pytest.raises(UserError, match=expected) as error:
        import_published([str(path)], [], tmp_path / "out")
    assert "p.jsonl:2" in str(error.value) or "'b'" in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_names_of_the_sources(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", published())
    with pytest.raises(UserError, match="--names gives a, b, expected 3 different names"):
        import_published([str(path)], ["a", "b"], tmp_path / "out")
    for names in (["initial", "a", "b"], ["a/b", "a", "b"], ["a", "a", "b"]):
        with pytest.raises(UserError, match="expected 3 different names"):
            import_published([str(path)], names, tmp_path / "out")


def test_nothing_is_replaced(tmp_path, scored):
    path = write_jsonl(tmp_path / "p.jsonl", published())
    import_published([str(path)], [], tmp_path / "out")
    with pytest.raises(UserError, match="sources.yaml exists"):
        import_published([str(path)], [], tmp_path / "out")
    run(tmp_path, scored, *scored[2])
    with pytest.raises(UserError, match="out.json exists"):
        run(tmp_path, scored, *scored[2])


RECORDS = [record(i) for i in range(4)]


def vllm(ids, rng):
    """`prompt_logprobs` as vLLM's server returns it with prompt_logprobs=1."""
    entries: list[Any] = [None]
    for token in ids[1:]:
        value = {"logprob": -float(rng.random()), "rank": 3, "decoded_token": "x"}
        entries.append({str(token): value, "99999": {"logprob": -0.01, "rank": 1}})
    return entries


@pytest.fixture
def scored(tmp_path):
    """Records, a tokenizer, and what vLLM says of each response, as lists and as objects."""
    rows = [
        {
            "id": r.id,
            "prompt": list(r.prompt),
            "chosen": list(r.responses[0]),
            "rejected": list(r.responses[1]),
        }
        for r in RECORDS
    ]
    write_jsonl(tmp_path / "r.jsonl", *rows)
    chat, rng, lines = ChatTokenizer(byte_tokenizer()), np.random.default_rng(0), []
    for r in RECORDS:
        tokens = chat.encode(r)
        both = [vllm([*tokens.prompt_ids, *ids], rng) for ids in tokens.response_ids]
        lines.append({"id": r.id, "chosen": both[0], "rejected": {"prompt_logprobs": both[1]}})
    return tmp_path / "r.jsonl", chat, lines


def run(folder, scored, *lines, **options):
    records, chat, _ = scored
    path = write_jsonl(folder / "lp.jsonl", *lines)
    options = {"name": "qwen", "tokenizer": chat} | options
    import_tokens([str(records)], [str(path)], str(folder / "out"), **options)
    return LogprobStore(folder / "out")


def test_vllm(tmp_path, scored):
    _, chat, lines = scored
    store = run(tmp_path, scored, *reversed(lines))
    for i, r in enumerate(RECORDS):
        prompt = len(chat.encode(r).prompt_ids)
        ids = chat.encode(r).response_ids[0].tolist()
        expected = [
            e[str(t)]["logprob"] for e, t in zip(lines[i]["chosen"][prompt:], ids, strict=True)
        ]
        assert store.logprobs(i, 0).tolist() == np.array(expected, np.float32).tolist()
    assert store.manifest["tokenizer"] == chat.describe()
    assert store.manifest["imported"]["form"] == "log-probs by token"
    store.check_against(write_tokens(tmp_path, read_records(scored[0])), same_tokenizer=True)


def test_lists_of_numbers(tmp_path, scored):
    _, chat, _ = scored
    lines: list[dict[str, Any]] = []
    for r in RECORDS:
        values = [[-0.5] * len(ids) for ids in chat.encode(r).response_ids]
        lines.append({"id": r.id, "chosen": values[0], "rejected": values[1]})
    store = run(tmp_path, scored, *lines)
    assert store.sums(0).tolist() == [
        -0.5 * len(lines[0]["chosen"]),
        -0.5 * len(lines[0]["rejected"]),
    ]
    (tmp_path / "out.json").unlink()
    unchecked = run(tmp_path, scored, *lines, tokenizer=None)
    assert unchecked.manifest["tokenizer"]["path"] is None
    (tmp_path / "out.json").unlink()
    lines[2]["rejected"].append(-1.0)
    with pytest.raises(UserError, match="lp.jsonl:3: 'rejected' of record 'r-2' has .* log-probs"):
        run(tmp_path, scored, *lines)


def test_missing_records(tmp_path, scored):
    lines = scored[2]
    with pytest.raises(UserError, match="1 of 4 records have no log-probs, the first is 'r-3'"):
        run(tmp_path, scored, *lines[:3])
    store = run(tmp_path, scored, *lines[:3], mask_missing=True)
    assert store.masked_records.tolist() == [False, False, False, True]
    assert store.note(3) == "not among the imported log-probs"


def other_token(line):
    entry = line["chosen"][-2]
    entry["7777"] = entry.pop(next(iter(entry)))


BROKEN = {
    "unknown id": (lambda line: line.update(id="zz"), "no preference record has the id 'zz'"),
    "twice": (lambda line: line.update(id="r-0"), "log-probs of 'r-0' for the second time"),
    "absent": (lambda line: line.pop("chosen"), "'chosen' of record 'r-1' is missing"),
    "too short": (lambda line: line["chosen"].pop(), "positions, but the tokenizer makes"),
    "other token": (other_token, "has no log-prob of token .* other tokens were scored"),
    "infinite": (
        lambda line: next(iter(line["chosen"][-1].values())).update(logprob=float("-inf")),
        "record 'r-1': log-prob -inf at token",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_log_probs(tmp_path, scored, name):
    lines = json.loads(json.dumps(scored[2]))
    change, expected = BROKEN[name]
    change(lines[1])
    with pytest.raises(UserError, match=expected):
        run(tmp_path, scored, *lines)
    assert not list(tmp_path.glob("out*"))


def test_vllms_form_needs_the_tokenizer(tmp_path, scored):
    with pytest.raises(UserError, match="give --tokenizer"):
        run(tmp_path, scored, *scored[2], tokenizer=None)
    with pytest.raises(UserError, match="lp.jsonl:1: broken JSON"):
        run(tmp_path, scored, "{")
    scored[0].write_text("")
    with pytest.raises(UserError, match="the file has no records"):
        run(tmp_path, scored, *scored[2])


def test_the_command(tmp_path, scored, tool):
    path = write_jsonl(tmp_path / "p.jsonl", published(source="x"), published(chosen="2"))
    argv = "--input", path, "--output", tmp_path / "out", "--names", "a", "b", "c"
    code, _, err = tool("import_logprobs", "published", *argv)
    assert code == 2 and "p.jsonl:2: field 'rejected' is a whole conversation" in err
    code, out, err = tool("import_logprobs", "published", *argv, "--on-bad-record", "skip")
    assert code == 0 and "skipped 1 bad records" in err
    assert "ignored fields: source (1 record)\n" in err, "its own fields are used"
    assert "prefers chosen" in out and "sources.yaml" in out
    assert yaml.safe_load((tmp_path / "out" / "sources.yaml").read_text())["initial"] == "initial"
    scored[1].tokenizer.save_pretrained(tmp_path / "tok")
    lines = write_jsonl(tmp_path / "lp.jsonl", *scored[2])
    code, _, err = tool(
        "import_logprobs", "tokens", "--input", scored[0], "--logprobs", lines, "--name", "m",
        "--tokenizer", tmp_path / "tok", "--output", tmp_path / "m",
    )  # fmt: skip
    assert code == 0 and len(LogprobStore(tmp_path / "m")) == 4, err


@pytest.mark.parametrize(
    "flags", [["--score", "all"], ["--chat-template-options", '{"a": 1}'], ["--trust-remote-code"]]
)
def test_how_a_tokenizer_is_used_needs_one(tmp_path, tool, flags):
    path = tmp_path / "never-read.jsonl"
    words = ["--input", path, "--logprobs", path, "--name", "m", "--output", tmp_path / "out"]
    code, _, err = tool("import_logprobs", "tokens", *words, *flags)
    assert code == 2 and "no effect without --tokenizer" in err


@pytest.mark.parametrize("listed", [False, True])
def test_the_vllm_example_of_the_docs(tmp_path, scored, monkeypatch, listed):
    """Runs as it is written, with a stand-in for vLLM; what it writes is read."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)

    class LLM:
        def __init__(self, model, tensor_parallel_size):
            pass

        def generate(self, prompts, params):
            for prompt in prompts:
                ids = prompt["prompt_token_ids"]
                first_is_none = [{t: SimpleNamespace(logprob=-t / 100)} for t in ids]
                yield SimpleNamespace(prompt_logprobs=[None, *first_is_none[1:]])

    fake: Any = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda max_tokens, prompt_logprobs: None
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.chdir(tmp_path)
    records, chat, _ = scored
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    for row in rows if listed else ():
        row["responses"] = [row.pop("rejected"), row.pop("chosen"), "so"][::-1]
    write_jsonl(Path("train.jsonl"), *rows)
    chat.tokenizer.save_pretrained("qwen2.5-14b-instruct")
    exec(snippet, {})
    import_tokens(["train.jsonl"], ["qwen.jsonl"], "out", name="qwen", tokenizer=chat)
    ids, place = chat.encode(RECORDS[2]).response_ids[1], 2 if listed else 1
    np.testing.assert_allclose(LogprobStore("out").logprobs(2, place), -ids / 100, rtol=1e-6)


def test_only_scored_tokens_are_imported(tmp_path, scored):
    """From vLLM's positions, from a number a token, from a number a scored token: the same."""
    chat: Any = Marking({"r-1": "no tools"})
    rng = np.random.default_rng(3)
    lines: dict[str, list[dict]] = {"vllm": [], "all": [], "scored": []}
    wanted = []
    for r in RECORDS:
        tokens = Marking().encode(r)
        assert tokens.scored is not None
        line: dict[str, Any] = {kind: {"id": r.id} for kind in lines}
        for name, ids, mark in zip(
            ("chosen", "rejected"), tokens.response_ids, tokens.scored, strict=True
        ):
            entries = vllm([*tokens.prompt_ids.tolist(), *ids.tolist()], rng)
            here = entries[len(tokens.prompt_ids) :]
            values = [e[str(t)]["logprob"] for e, t in zip(here, ids.tolist(), strict=True)]
            line["vllm"][name], line["all"][name] = entries, values
            line["scored"][name] = np.array(values)[mark].tolist()
            wanted.append(np.array(values, np.float32)[mark].tolist())
        for kind in lines:
            lines[kind].append(line[kind])
    with pytest.raises(UserError, match=r"lp.jsonl:2: record 'r-1' .*no tools; --on-bad-record"):
        run(tmp_path, scored, *lines["vllm"], tokenizer=chat)
    for kind in lines:
        folder = tmp_path / kind
        folder.mkdir()
        store = run(folder, scored, *lines[kind], tokenizer=chat, on_bad="skip")
        assert store.masked_records.tolist() == [False, True, False, False]
        assert store.note(1) == "the chat template refuses it: no tools"
        for i in (0, 2, 3):
            found = [store.logprobs(i, r).tolist() for r in range(2)]
            assert found == wanted[2 * i : 2 * i + 2], kind
    first = Marking().encode(RECORDS[0])
    assert first.scored is not None
    short = [{**lines["all"][0], "chosen": [-1.0] * 99}, *lines["all"][1:]]
    count, marked = len(first.response_ids[0]), int(first.scored[0].sum())
    with pytest.raises(UserError, match=f"99 log-probs, .* makes {count} tokens, {marked} of them"):
        run(tmp_path, scored, *short, tokenizer=chat, on_bad="skip")
