"""run.yaml: what is wrong in it is said with file and line; what is right says all that it is."""

import json

import jsonschema
import pytest
import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.init import commented
from megatron_infifpo.run.reading import read_run
from megatron_infifpo.run.show import as_shell, as_yaml, schema
from megatron_infifpo.run.start import read_source, run_of_flags
from support.launcher import ROOT

WRONG = {
    "a name that is none": ("pivot: {model", "pivto: {model", [
        "run.yaml:3: pivto is no field, did you mean pivot?"]),
    "inside of a list": ("lr: 1e-6", "learning: 1e-6", [
        "run.yaml:9: train[0].learning is no field"]),
    "a type": ("epochs: 3", "epochs: three", ["run.yaml:9: train[0].epochs is 'three'"]),
    "a range": ("epochs: 3", "epochs: 0", ["run.yaml:9: train[0].epochs is '0'", "greater than 0"]),
    "a choice": ("precision: fp32", "precision: fp8", ["run.yaml:2: precision is 'fp8'", "bf16"]),
    "a method": ("method: infifpo,", "method: infifp,", [
        "run.yaml:10: there is no method 'infifp', did you mean infifpo?"]),
    "a start": ("method: sft,", "start: dpo, method: sft,", [
        "run.yaml:9: there is no training before it 'dpo', did you mean pivot?"]),
    "a file": ("[pairs.jsonl]", "[peers.jsonl]", ["run.yaml:7: peers.jsonl is not there"]),
    "no data": ("pairs: [pairs.jsonl], ", "", ["run.yaml:7: data: expected pairs or prompts"]),
    "two of a name": ("name: qwen2.5", "name: qwen2", ["run.yaml:6: the name qwen2 is used twice"]),
    "two trainings": ("name: dpo, ", "", ["run.yaml:11: the name infifpo is used twice"]),
    "some weights": ("model: qwen}", "model: qwen, weight: 2}", [
        "run.yaml:4: there are weights, but not of pivot, qwen2.5"]),
    "a reserved name": ("name: dpo", "name: logprobs", ["run.yaml:11: logprobs is a name"]),
    "no sources": ("sources:\n", "sourced:\n", ["run.yaml:4: sourced is no field, did you mean"]),
    "twice": ("output: out", "output: out\noutput: in", [
        "output is given twice, in lines 1 and 2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong(folder, case):
    old, new, said = WRONG[case]
    text = (folder / "run.yaml").read_text()
    assert text.count(old) >= 1
    (folder / "run.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        read_run("run.yaml")
    for part in said:
        assert part in str(error.value)


def test_all_at_once(folder):
    (folder / "run.yaml").write_text("pivot: {modell: p}\ndata: {pairs: [a], lists: 3}\n")
    with pytest.raises(UserError) as error:
        read_run("run.yaml")
    lines = str(error.value).splitlines()
    assert "run.yaml:1: output is missing" in lines
    assert "run.yaml:1: pivot.model is missing" in lines
    assert any("run.yaml:1: pivot.modell is no field, did you mean model?" in x for x in lines)
    assert any(line.startswith("run.yaml:2: data.lists is '3'") for line in lines)


def test_values_as_they_are_meant(folder):
    """YAML 1.1 would take 04:00:00 for seconds, 1e-6 for a text; a template has numbers."""
    with open("run.yaml", "a") as file:
        file.write("cluster: {executor: slurm, ranks: 8, sbatch: {time: 04:00:00, account: 010}}\n")
    run = read_run("run.yaml")
    assert run.cluster.sbatch == {"time": "04:00:00", "account": "010"}
    assert run.train[0].lr == 1e-6
    assert run.pivot.chat_template_options == {"enable_thinking": False, "budget": 512}


def test_shown_in_full_is_the_same_run(folder):
    run = read_run("run.yaml")
    text = as_yaml(run, defaults=True)
    assert "    seq_length: 4096  # default" in text
    assert "    epochs: 3\n" in text
    (folder / "full.yaml").write_text(text)
    assert read_run("full.yaml") == run
    (folder / "given.yaml").write_text(as_yaml(run))
    assert read_run("given.yaml") == run


def test_schema(folder):
    found = json.loads(schema())
    jsonschema.Draft202012Validator.check_schema(found)
    validator = jsonschema.Draft202012Validator(found)
    content = yaml.safe_load((folder / "run.yaml").read_text())
    content["train"][0]["lr"] = 1e-6  # in editors' YAML 1.2 it is a number, in PyYAML's 1.1 a text
    assert not list(validator.iter_errors(content))
    wrong = {"output": "o", "pivot": {"modle": "p"}, "data": {"pairs": "a"}}
    assert {".".join(map(str, e.path)) for e in validator.iter_errors(wrong)} == {
        "pivot",
        "data.pairs",
    }
    # Editors read this copy.
    assert (ROOT / "docs" / "run.schema.json").read_text() == schema()


def test_written_by_init(folder):
    (folder / "a.jsonl").write_text("")
    given = run_of_flags(
        pivot="pivot", sources=["qwen", "code,math=coder"], pairs=["a.jsonl"], output="out"
    )
    text = commented(given, "new.yaml")
    (folder / "new.yaml").write_text(text)
    run = read_run("new.yaml")
    assert [(s.name, s.domains) for s in run.sources] == [
        ("qwen", None),
        ("coder", ["code", "math"]),
    ]
    assert [(t.method, t.lr, t.epochs) for t in run.train] == [
        ("sft", 1e-6, 3),
        ("infifpo", 1e-7, 1),
    ]
    # Every field is there, and what is commented out is as it says.
    free = text.replace("# precision: bf16", "precision: bf16").replace("# cluster:", "cluster:")
    free = free.replace("#   at_once: 1 ", "  at_once: 1 ")
    (folder / "new.yaml").write_text(free)
    assert read_run("new.yaml") == run
    for name in ("heldout", "benchmarks", "reward_model", "retries", "seq_length"):
        assert f" {name}: " in text


def test_source_of_a_flag(folder):
    assert read_source("code=coder") == {"name": "coder", "model": "coder", "domains": ["code"]}
    (folder / "a=b").mkdir()
    assert read_source("a=b") == {"name": "a=b", "model": "a=b"}


def test_as_shell(folder):
    text = as_shell(read_run("run.yaml"))
    assert ': "${RUN:=out}"' in text
    assert ': "${SFT:=epochs=3 lr=1e-06 global_batch_size=128' in text
