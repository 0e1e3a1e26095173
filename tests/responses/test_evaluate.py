"""Evaluation through lm-evaluation-harness, on a small task file and tiny models."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from launcher import ROOT
from workers import load_tool

from megatron_infifpo.cli import UserError
from megatron_infifpo.responses.benchmarks import BENCHMARKS, score_of, table

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [red, blue]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def command(words: list, environment: dict[str, str]) -> None:
    """Run a program in a process of its own, without this one's stand-ins for CUDA."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def evaluate(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    questions = [{"question": f"sky number {i}", "answer": i % 2} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    offline = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}

    def call(*flags: str) -> str:
        argv = ["--tasks", str(tmp_path / "tasks"), "--output", str(tmp_path / "out"), *flags]
        command([ROOT / "tools" / "evaluate.py", *argv], offline)
        return (tmp_path / "out" / "table.md").read_text()

    return call


def test_two_models_side_by_side(evaluate, tmp_path, monkeypatch):
    models = []
    for seed, name in enumerate(("base", "fused")):
        models += ["--model", f"{name}={tiny.save_model(tmp_path / name, 'llama', seed=seed)}"]
    options = ("--benchmarks", "colours", "--dtype", "float32", "--batch", "2")
    found = evaluate(*models, *options)
    header, _, row, mean = found.splitlines()
    assert header == "| benchmark | base | fused |"
    scores = [float(cell) for cell in row.split("|")[2:4]]
    kept = json.loads((tmp_path / "out" / "base-colours.json").read_text())
    assert scores[0] == pytest.approx(100 * kept["results"]["acc,none"], abs=0.01)
    assert mean.startswith("| mean of 1 |")
    # What is there is not computed again.
    kept["results"]["acc,none"] = 0.123
    (tmp_path / "out" / "base-colours.json").write_text(json.dumps(kept))
    argv = [*models, *options, "--tasks", "tasks", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
    load_tool("evaluate").main()
    assert "| colours | 12.30 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "x"], "expected NAME=DIR"),
        (["--model", "x=/nowhere"], "is not a Hugging Face folder"),
        (["--model", "x=/", "--benchmarks", "MBPP"], "runs code that the model writes"),
        (["--model", "x=/", "--benchmarks", "TheoremQA"], "there is no benchmark 'TheoremQA'"),
    ],
)
def test_refused(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--output", str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match=message):
        load_tool("evaluate").main()


def test_tasks_exist_in_the_harness():
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")
    known = set(tasks.TaskManager().all_tasks)
    assert len(BENCHMARKS) == 11
    assert {b.task for b in BENCHMARKS.values() if b.task} <= known


def test_table():
    scores = {"base": {"GSM8K": 50.0, "MMLU": 60.0}, "fused": {"GSM8K": 52.0}}
    assert table(scores).splitlines()[2:] == [
        "| GSM8K | 50.00 | 52.00 |", "| MMLU | 60.00 |  |", "| mean of 1 | 50.00 | 52.00 |",
    ]  # fmt: skip
    assert score_of("DROP", {"em,none": 0.1, "f1,none": 0.25}) == 25.0
    with pytest.raises(UserError, match="reports em,none"):
        score_of("DROP", {"em,none": 0.1})
