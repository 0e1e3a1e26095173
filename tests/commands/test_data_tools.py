import pytest

from megatron_infifpo.records.records import read_records, records_fingerprint
from megatron_infifpo.tokens.dataset import TokenDataset
from support.datasets import byte_tokenizer, write_jsonl, write_scores


@pytest.fixture
def prepared(tmp_path, tool):
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    values = [
        {"id": f"q{i}", "domain": d, "prompt": "why?", "chosen": f"yes {i}", "rejected": "</s> no"}
        for i, d in enumerate(["math", "code", "math"])
    ]
    path = write_jsonl(tmp_path / "train.jsonl", *values)
    options = ("--tokenizer", tmp_path / "tok", "--output", tmp_path / "out" / "train")
    code, out, err = tool("prepare_preferences", "--input", path, *options)
    assert code == 0, err
    return tmp_path, path, out


def test_prepare(prepared):
    folder, path, out = prepared
    tokens = TokenDataset(folder / "out" / "train")
    assert len(tokens) == 3 and tokens.records_sha256 == records_fingerprint(read_records(path))
    assert tokens.manifest["source_files"] == [str(path)]
    assert "3 records" in out and "domains: math 2, code 1" in out and "p100" in out
    assert "rejected" in out


def test_prepare_reports_bad_records(prepared, tool):
    folder, path, _ = prepared
    bad = write_jsonl(folder / "bad.jsonl", "{", '{"prompt": "q"}')
    options = ("--tokenizer", folder / "tok", "--output", folder / "new")
    code, _, err = tool("prepare_preferences", "--input", path, bad, *options)
    assert code == 2 and f"error: {bad}:1: broken JSON" in err and "Traceback" not in err
    assert not list(folder.glob("new*"))
    skip = ("--on-bad-record", "skip")
    code, out, err = tool("prepare_preferences", "--input", path, bad, *options, *skip)
    assert code == 0 and "skipped 2 bad records" in err and f"{bad}:2: field 'chosen'" in err
    assert "3 records" in out
    code, _, err = tool("prepare_preferences", "--input", bad, *options, *skip)
    assert code == 2 and "bad.jsonl: none of 2 records can be used" in err


def test_inspect(prepared, tool):
    folder, path, _ = prepared
    records = read_records(path)
    lengths = TokenDataset(folder / "out" / "train").response_lengths
    write_scores(folder / "pivot", records, lengths)
    write_scores(folder / "a", records, lengths + 1, seed=1)
    write_scores(folder / "b", records, lengths, seed=2, masked=[0])
    (folder / "sources.yaml").write_text(
        "initial: pivot\nsources: [{name: a, logprobs: a}, {name: b, logprobs: b},"
        " {name: c, logprobs: a, domains: [code]}]"
    )
    data = ("--data", folder / "out" / "train")
    sources = ("--sources", folder / "sources.yaml")
    code, out, err = tool("inspect_preferences", *data, *sources, "--id", "q0")
    assert code == 0, err
    assert "record 'q0', index 0, domain math" in out
    assert "<|im_start|>assistant\n" in out and "</s> no<|im_end|>" in out
    assert "  |  " in out and "'<|im_end|>'" in out
    assert "masked: too long" in out and "its domains do not include" in out
    assert "reference at step 0: fused, means, dpo's loss" in out and "1.000" in out
    loss = float(out.split("\nloss ")[1])
    assert loss >= 0.6931, "clipped references are on the far side of the initial pivot"
    for method, expected in (
        (["--method", "sft"], "no reference: SFT"),
        (["--method", "dpo"], "loss 0.6931"),
        (["--method", "fpo", "--initial-as-source"], "reference at step 0: fused, sums"),
        (["--objective", "ipo", "--fusion", "average"], "ipo's loss"),
    ):
        code, out, err = tool("inspect_preferences", *data, *sources, "--id", "q1", *method)
        assert code == 0 and expected in out, err
    code, _, err = tool("inspect_preferences", *data, *sources, "--id", "q1", "--method", "wrpo")
    assert code == 2 and "record 'q0'" in err and "has no 'pivot_chosen'" in err
    code, out, _ = tool("inspect_preferences", *data, "--id", "q1")
    assert code == 0 and "log-probs" not in out and "renders" not in out
    asked = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    code, out, err = tool("inspect_preferences", *data, "--id", "q1", "--tokens")
    assert code == 0 and f"the template renders: {asked}\n" in out, err
    assert "chosen, rendered, what is scored in « »: «yes 1<|im_end|>»\n" in out
    assert "rejected, rendered, what is scored in « »: «</s> no<|im_end|>»\n" in out
    assert "rejected, tokens: '<' '/' 's' '>' ' ' 'n' 'o' '<|im_end|>'" in out
    code, _, err = tool("inspect_preferences", *data, "--id", "zz")
    assert code == 2 and "has no record 'zz', expected an id such as 'q0'" in err


def test_inspect_wants_the_same_tokenizer(prepared, tool):
    folder, _, _ = prepared
    other = byte_tokenizer()
    other.add_tokens(["extra"])
    other.save_pretrained(folder / "other")
    options = ("--data", folder / "out" / "train", "--id", "q0", "--tokenizer", folder / "other")
    code, _, err = tool("inspect_preferences", *options)
    assert code == 2 and "has tokenizer_sha256" in err
