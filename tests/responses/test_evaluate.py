"""Evaluation through lm-evaluation-harness, on a small task file and tiny models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.responses import evaluate as evaluate_module
from megatron_infifpo.responses import evaluation
from megatron_infifpo.responses.benchmarks import BENCHMARKS, Benchmark, score_of, table
from megatron_infifpo.responses.evaluate import EvaluationJob, choose
from megatron_infifpo.responses.harness import open_harness
from support import tiny
from support.launcher import ROOT

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
        command(["-m", "megatron_infifpo", "evaluate", *argv], offline)
        return (tmp_path / "out" / "table.md").read_text()

    return call


def test_two_models_side_by_side(evaluate, tmp_path):
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
    argv = [*models, *options]
    argv += ["--tasks", str(tmp_path / "tasks"), "--output", str(tmp_path / "out")]
    run_command("evaluate", argv)
    assert "| colours | 12.30 |" in (tmp_path / "out" / "table.md").read_text()


class Harness:
    """What `infifpo evaluate` asks of lm-evaluation-harness, without it."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.results, self.evaluated = {"acc,none": 0.25}, []
        monkeypatch.setattr(evaluate_module, "open_harness", lambda tasks, folder: None)
        monkeypatch.setattr(evaluate_module, "load", lambda folder, options: Path(folder).name)
        monkeypatch.setattr(evaluate_module, "run_task", self.evaluate)
        (folder / "tasks").mkdir()
        (folder / "data.jsonl").write_text("{}")
        (folder / "tasks" / "colours.yaml").write_text(TASK.format(data=folder / "data.jsonl"))

    def evaluate(self, model, benchmark, manager, options):
        self.evaluated.append((model, benchmark.task))
        return {"results": self.results}

    def __call__(self, *flags: str) -> list:
        """What is evaluated now."""
        self.evaluated = []
        fixed = ["--tasks", self.folder / "tasks", "--output", self.folder / "out"]
        fixed += ["--benchmarks", "colours", *flags]
        run_command("evaluate", [*map(str, fixed)])
        return self.evaluated


@pytest.fixture
def harness(tmp_path, monkeypatch):
    return Harness(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(folder / name, "llama", seed=i) for i, name in enumerate("ab")}


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


CHANGES = {
    "weights": lambda f, m: shutil.copy(f / "b" / "model.safetensors", m),
    "config": lambda f, m: edit(m / "config.json", rms_norm_eps=0.1),
    "generation_config": lambda f, m: edit(m / "generation_config.json", do_sample=True),
    "chat_template": lambda f, m: (m / "chat_template.jinja").write_text("{{ messages[0] }}"),
    "tokenizer": lambda f, m: edit(m / "tokenizer_config.json", add_bos_token=True),
    "task_files": lambda f, m: (f / "tasks" / "utils.py").write_text("x = 1"),
    "task_files, data": lambda f, m: (f / "data.jsonl").write_text('{"a": 1}'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_result_holds_until_something_changes(harness, models, tmp_path, capsys, what):
    model = Path(shutil.copytree(models["a"], tmp_path / "a"))
    shutil.copytree(models["b"], tmp_path / "b")
    flags = ("--model", f"x={model}")
    assert harness(*flags) == [("a", "colours")]
    assert harness(*flags) == []
    assert "x: colours: used again: " in capsys.readouterr().out
    CHANGES[what](tmp_path, model)
    assert harness(*flags) == [("a", "colours")]
    line = next(x for x in capsys.readouterr().out.splitlines() if "evaluated again" in x)
    assert what.split(",")[0] in line and line.endswith(" changed")
    assert harness(*flags) == []


def test_flags_and_the_harness_are_part_of_a_result(harness, models, monkeypatch):
    flags = ["--model", f"x={models['a']}"]
    harness(*flags)
    for more in (["--limit", "2"], ["--dtype", "float32"], ["--chat-template-options", '{"a": 1}']):
        assert harness(*flags, *more) and not harness(*flags, *more)
        flags += more
    assert not harness(*flags, "--batch", "3"), "that is speed"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert harness(*flags)
    assert "at most 2 questions" in (harness.folder / "out" / "table.md").read_text()


def test_a_task_of_the_harness_does_not_depend_on_other_task_files(tmp_path):
    (tmp_path / "a.yaml").write_text("task: mine")

    def setting(name: str, task: str) -> object:
        found = evaluation.task_settings(name, Benchmark(task), str(tmp_path))
        return found["task_files_sha256"]

    assert setting("GSM8K", "gsm8k") is None and setting("mine", "mine")
    (tmp_path / "b.yaml").write_text("group: x\ntask: [gsm8k]")
    assert setting("GSM8K", "gsm8k")


def test_names_with_slashes_and_one_name_twice(harness, models):
    a, b = (f"{folder}" for folder in models.values())
    assert len(harness("--model", f"org/base={a}", "--model", f"../x={b}")) == 2
    names = {path.name for path in (harness.folder / "out").iterdir()}
    assert names == {"org%2Fbase-colours.json", "..%2Fx-colours.json", "table.md"}
    for flags, message in (
        ((f"x={a}", f"x={b}"), "--model x is given twice, for .*a and for .*b"),
        ((f"={a}",), "expected NAME=DIR"),
        ((f"{'n' * 300}={a}",), "expected a short name"),
        ((f"Org/Base={a}", f"org/base={b}"), "would share"),
    ):
        with pytest.raises(UserError, match=message):
            harness(*(word for flag in flags for word in ("--model", flag)))
        assert not harness.evaluated


def test_nothing_is_evaluated_before_all_is_there(harness, models, tmp_path):
    """A model without a template, without a tensor, or no place for the results."""
    good = ("--model", f"good={models['a']}")
    bad = Path(shutil.copytree(models["b"], tmp_path / "b"))
    bad.joinpath("chat_template.jinja").unlink()
    with pytest.raises(UserError, match="b has no chat template, and benchmarks are asked"):
        harness(*good, "--model", f"bad={bad}")
    shutil.copy(models["b"] / "chat_template.jinja", bad)
    tensors = tiny.load_weights(bad)
    tensors.pop("lm_head.weight")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight"):
        harness(*good, "--model", f"bad={bad}")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="--output: cannot write"):
        harness(*good)
    assert not harness.evaluated


def test_a_result_without_its_metric_is_kept_and_told(harness, models):
    flags = [w for name, folder in models.items() for w in ("--model", f"{name}={folder}")]
    harness.results = {"alias": "x", "f1_stderr,none": 0.1}
    with pytest.raises(UserError, match="a: .*f1_stderr.*a-colours.json keeps them.*b-colours"):
        harness(*flags)
    assert len(harness.evaluated) == 2, "the other model is evaluated, too"
    kept = json.loads((harness.folder / "out" / "a-colours.json").read_text())
    assert kept["results"] == harness.results


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "x"], "expected NAME=DIR"),
        (["--model", "x=/", "--chat-template-options", "[1]"], "list found.*expected a JSON obj"),
        (["--model", "x=/nowhere"], "is not a Hugging Face folder"),
        (["--model", "x=/", "--benchmarks", "MBPP"], "runs code that the model writes"),
        (["--model", "x=/", "--benchmarks", "TheoremQA"], "there is no benchmark 'TheoremQA'"),
        (["--model", "x=/", "--tasks", "/nowhere"], "--tasks /nowhere is not a folder"),
    ],
)
def test_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run_command("evaluate", ["--output", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit", "0"], ["--limit", "-3"], ["--tensor-model-parallel-size", "0"],
        ["--tensor-parallel-size", "0"], ["--batch", "many"],
        ["--dtype", "bf17"],
    ],
)  # fmt: skip
def test_bad_numbers(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        run_command("evaluate", ["--model", "x=y", *flags])
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err.replace(
        "invalid choice", "expected"
    )


def test_tasks_of_the_user_that_cannot_be_evaluated(tmp_path, monkeypatch):
    """Said before a model is loaded. The harness's own tasks, which take long to list, are away."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")
    small = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **options: small(**options | {"include_defaults": False})
    )
    text = TASK.format(data=tmp_path / "gone.jsonl")
    (tmp_path / "colours.yaml").write_text(text.replace("task:", "tag: several\ntask:"))
    for task, message in (
        ("none", "there is no task 'none'"),
        ("several", "'several' is a tag of several tasks"),
        ("colours", "cannot load the task 'colours' .*gone.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            open_harness({task}, str(tmp_path))


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


def test_what_is_left_out(tmp_path, capsys):
    """In the order of the list, the same in every process."""
    chosen = choose(EvaluationJob({"base": "folder"}, tmp_path))
    said = capsys.readouterr().out.removeprefix("left out: ").split(" (see")[0].split(", ")
    assert said == [name for name in BENCHMARKS if name not in chosen] and len(said) > 1
