"""`infifpo fuse` on tiny models, from Hugging Face to Hugging Face; then everything is skipped."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_infifpo.commands.fuse import check_words
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.run import driver, layouts
from megatron_infifpo.run.driver import run_stages
from megatron_infifpo.run.outcome import outcome
from megatron_infifpo.run.plan import Plan
from megatron_infifpo.run.reading import make_run, read_run
from megatron_infifpo.run.stages import stages_of
from support import tiny
from support.launcher import ROOT

RUN = """\
output: FOLDER/out
precision: fp32
pivot: {model: FOLDER/llama}
sources:
  - {name: qwen, model: FOLDER/qwen}
  - {name: phi, model: FOLDER/phi, domains: [code]}
data: {pairs: [FOLDER/pairs.jsonl], heldout: [FOLDER/heldout.jsonl]}
train:
  - &usual {method: sft, lr: 1e-3, global_batch_size: 4, seq_length: 256, epochs: 2}
  - &second {<<: *usual, method: infifpo, epochs: 1}
  - {<<: *second, name: dpo, flags: {reference: initial}}
  - &chat {<<: *second, name: chat-qwen, method: fusechat, data: preference, sources: [qwen]}
  - {<<: *chat, name: chat-phi, sources: [phi]}
  - &once {<<: *usual, method: fusellm, epochs: 1, export: false}
  - {<<: *once, method: infifusion}
  - &uld {<<: *once, name: uld-qwen, method: infifusion, sources: [qwen]}
  - {<<: *uld, name: uld-phi, sources: [phi]}
merge:
  - {name: chat, models: [chat-qwen, chat-phi]}
  - {name: uld, models: [uld-qwen, uld-phi], method: varm}
evaluation: {sources: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuse")
    for seed, (name, family) in enumerate(
        {"llama": "llama", "qwen": "qwen2", "phi": "phi3"}.items()
    ):
        tiny.save_model(path / name, family, seed=seed + 1)
    tiny.write_records(path / "pairs.jsonl", 24)
    tiny.write_records(path / "heldout.jsonl", 8, seed=5)
    (path / "run.yaml").write_text(RUN.replace("FOLDER", str(path)))
    return path


@pytest.fixture
def forked(monkeypatch, ranks, folder):
    """Stages run on forked ranks instead of starting Python each time; returns what was run."""
    ran: list[str] = []

    def start(words, log):
        arguments = words[words.index("megatron_infifpo") + 1 :]
        ran.append(arguments[0])
        ranks(1, "support.tools:command", "megatron_infifpo", arguments)
        log.write_text(ranks.logs[0])
        return 0

    @contextlib.contextmanager
    def stoppable(environment):
        yield start

    monkeypatch.chdir(folder)
    monkeypatch.setattr(driver, "stoppable", stoppable)
    monkeypatch.setattr(layouts, "count_gpus", lambda: 0)
    return ran


def fuse() -> str:
    run = read_run("run.yaml")
    stages = stages_of(Plan(run, layouts.choose_layouts(run)))
    run_stages(run, stages)
    return outcome(run, stages)


def test_from_hugging_face_to_hugging_face(forked, folder):
    text = fuse()
    out = folder / "out"
    # Both halves are used, and by whom they should be.
    halves = [(out / "data" / f"{x}.jsonl").read_text().splitlines() for x in ("sft", "preference")]
    assert sum(map(len, halves)) == 24 and all(halves)
    steps = (out / "sft" / "latest_checkpointed_iteration.txt").read_text()
    assert int(steps) == 2 * len(halves[0]) // 4
    for name in ("infifpo", "dpo", "chat-qwen", "chat-phi"):
        run = json.loads((out / name / "run.json").read_text())
        assert run["started_from"]["checkpoint"] == str(out / "sft")
    # Every model is another one, and the exported ones are those that were trained.
    rows = {row["model"]: row for row in json.loads((out / "heldout.json").read_text())}
    assert list(rows) == [
        "qwen", "phi", "pivot", "sft", "infifpo", "dpo", "chat-qwen", "chat-phi",
        "fusellm", "infifusion", "uld-qwen", "uld-phi", "chat", "uld",
    ]  # fmt: skip
    prints = {
        LogprobStore(out / "logprobs" / "heldout" / name).manifest["weights_sha256"]
        for name in rows
    }
    assert len(prints) == len(rows)
    assert all(row["records"] == 8 for name, row in rows.items() if name != "phi")
    assert set(rows["phi"]["domains"]) == {"code"}
    assert all(name in text for name in rows)
    for name in ("infifpo", "dpo"):
        assert load_file(out / f"{name}-hf" / "model.safetensors")
    assert not (out / "fusellm-hf").exists() and not (out / "infifusion-hf").exists()
    targets = {
        path.stem: SoftTargetStore(path.with_suffix("")).sources
        for path in (out / "tokens" / "targets").glob("*.json")
    }
    assert targets == {
        "chat-qwen": ("qwen", "initial"), "chat-phi": ("phi", "initial"),
        "fusellm": ("qwen", "phi", "initial"), "infifusion": ("qwen", "phi"),
        "uld-qwen": ("qwen",), "uld-phi": ("phi",),
    }  # fmt: skip
    # What is merged is what the models have changed of what they start from.
    start, first, second, merged = (
        load_file(out / f"{name}-hf" / "model.safetensors")
        for name in ("sft", "uld-qwen", "uld-phi", "uld")
    )
    for name, tensor in merged.items():
        changes = torch.stack([first[name] - start[name], second[name] - start[name]])
        weights = (changes.double() ** 2).flatten(1).mean(1)
        change = torch.einsum("m,m...->...", weights / weights.sum(), changes.double())
        torch.testing.assert_close(tensor.double(), start[name] + change, atol=1e-6, rtol=0)
    assert (out / "infifpo" / "report.html").exists()
    # Given again it does nothing, and says the same.
    count = len(forked)
    assert fuse() == text and len(forked) == count
    # What is lost is made again: the same bytes.
    before = (out / "logprobs" / "qwen.bin").read_bytes()
    for path in (out / "logprobs").glob("qwen*"):
        path.unlink()
    fuse()
    assert forked[count:] == ["score"]
    assert (out / "logprobs" / "qwen.bin").read_bytes() == before


@pytest.mark.parametrize("name", ["demo", "ablation", "baselines"])
def test_files_of_examples(forked, folder, name):
    """They are of one folder: what two of them call by one name is the same stage."""
    found = {}
    for each in ("demo", name):
        path = ROOT / "examples" / each / "run.yaml"
        content = yaml.safe_load(path.read_text())
        # The models of the demo are made by it.
        content["pivot"]["model"] = "llama"
        for source, model in zip(content["sources"], ("qwen", "phi"), strict=True):
            source["model"] = model
        content["data"] |= {"pairs": ["pairs.jsonl"], "heldout": ["heldout.jsonl"]}
        run = make_run(content, str(path))
        stages = stages_of(Plan(run, layouts.choose_layouts(run)), report=False)
        check_words(run, stages, str(path))
        found[each] = {stage.name: stage for stage in stages}
    same = found["demo"].keys() & found[name].keys()
    assert {"split", "prepare-sft", "sft", "score-sft", "fused"} <= same
    for each in same - {"export-fused", "verify-fused"}:
        assert found["demo"][each] == found[name][each]
    assert Path("pairs.jsonl").exists()
