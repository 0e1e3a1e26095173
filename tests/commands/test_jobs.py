"""Jobs as Python makes them: what commands refuse, they refuse."""

from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.checks.conversion import VerificationJob
from megatron_infifpo.checks.data import DataJob
from megatron_infifpo.checks.inspection import InspectionJob
from megatron_infifpo.commands.flags import read_folders
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.recipes.launch import Launch
from megatron_infifpo.report.report import ReportJob
from megatron_infifpo.responses.completing import Wanted
from megatron_infifpo.responses.engines import EngineOptions, Sampling
from megatron_infifpo.responses.evaluate import EvaluationJob
from megatron_infifpo.responses.harness import HarnessOptions
from megatron_infifpo.responses.labelling import LabellingJob
from megatron_infifpo.responses.sample import SamplingJob, sample
from megatron_infifpo.responses.scorers import Judge
from megatron_infifpo.responses.server import ServerOptions
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.tokens.options import TokenizerOptions
from megatron_infifpo.tokens.prepare import PreparationJob

JUDGE = Judge(program="checks.py:passes")
WHOLE: dict[Any, dict[str, Any]] = {
    ScoringJob: {"backend": "megatron", "model": "m", "input": ["r.jsonl"], "output": "o"},
    VerificationJob: {"hf": "h", "load": "c"},
    PreparationJob: {"input": ["r.jsonl"], "tokenizer": "t", "output": "o"},
    TokenizerOptions: {},
    LabellingJob: {"input": ["a.jsonl"], "output": Path("o.jsonl"), "judge": JUDGE},
    Judge: {"program": "checks.py:passes"},
    EvaluationJob: {"models": {"a": "models/a"}, "output": Path("o")},
    HarnessOptions: {},
    EngineOptions: {},
    ServerOptions: {"server": "http://localhost"},
    Sampling: {},
    SamplingJob: {"input": ["p.jsonl"], "model": "m", "output": Path("o.jsonl")},
    InspectionJob: {"data": "d", "id": "r"},
    DataJob: {"data": "d"},
    ReportJob: {"run": Path("run")},
    Launch: {"name": "infifpo"},
    PlanningJob: {"model": {}, "gpus": 8},
}


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        (ScoringJob, {"tensor_model_parallel_size": None}, "-size is None, expected a whole"),
        (ScoringJob, {"micro_batch_tokens": None}, "--micro-batch-tokens is None, expected"),
        (ScoringJob, {"domains": "code"}, "--domains is 'code', expected a list or None"),
        (ScoringJob, {"bf16": "no"}, "--bf16 is 'no', expected True or False"),
        (VerificationJob, {"tensor_model_parallel_size": None}, "-size is None, expected a whole"),
        (VerificationJob, {"bf16": 1}, "--bf16 is 1, expected True or False"),
        (VerificationJob, {"tolerance": "1"}, "--tolerance is '1', expected a number or None"),
        (PreparationJob, {"tokenizer": None}, "--tokenizer is None, expected a text"),
        (TokenizerOptions, {"chat_template_options": "{}"}, "-options is '{}', expected a mapping"),
        (LabellingJob, {"input": "a.jsonl"}, "--input is 'a.jsonl', expected a list of files"),
        (LabellingJob, {"on_bad_record": "mend"}, "--on-bad-record is 'mend', expected one of"),
        (LabellingJob, {"judge": None}, "--judge is None, expected Judge"),
        (Judge, {"program": None}, "expected --reward-model or --program"),
        (Judge, {"reward_model": "m"}, "expected --reward-model or --program"),
        (Judge, {"batch": 0}, "--batch is 0"),
        (EvaluationJob, {"models": {}}, "--model: expected NAME=DIR, for at least one model"),
        (EvaluationJob, {"benchmarks": "mbpp"}, "--benchmarks is 'mbpp', expected a list or None"),
        (HarnessOptions, {"engine": "sglang"}, "--engine is 'sglang', expected one of transform"),
        (HarnessOptions, {"dtype": "bfloat16"}, "--dtype is 'bfloat16', expected one of bf16"),
        (HarnessOptions, {"batch": 0}, "--batch is 0, expected a whole number of at least 1"),
        (HarnessOptions, {"batch": "many"}, "--batch is 'many', expected a whole number"),
        (HarnessOptions, {"limit": 0}, "--limit is 0"),
        (EngineOptions, {"batch": 0}, "--batch is 0"),
        (EngineOptions, {"tensor_model_parallel_size": None}, "-size is None"),
        (ServerOptions, {"server_requests": 0}, "--server-requests is 0"),
        (ServerOptions, {"server_retries": -1}, "is -1, expected a whole number of at least 0"),
        (Sampling, {"count": 0}, "--count is 0"),
        (Sampling, {"max_tokens": 0}, "--max-tokens is 0"),
        (Sampling, {"top_p": 0.0}, "--top-p is 0.0, expected a number above 0, 1 at most"),
        (SamplingJob, {"input": "p.jsonl"}, "--input is 'p.jsonl', expected a list of files"),
        (SamplingJob, {"engine": "sglang"}, "--engine is 'sglang', expected one of transformers"),
        (SamplingJob, {"part": (3, 2)}, "--part is 3/2, expected I/N with I from 0 to N - 1"),
        (SamplingJob, {"part": (0, 1, 2)}, "--part is 0/1/2"),
        (SamplingJob, {"shard_prompts": 0}, "--shard-prompts is 0"),
        (SamplingJob, {"retries": -1}, "--retries is -1, expected a whole number of at least 0"),
        (SamplingJob, {"on_bad_record": "mend"}, "--on-bad-record is 'mend', expected one of"),
        (InspectionJob, {"method": resolve("dpo", beta=1.0)}, "an option of the method has no eff"),
        (DataJob, {"input": "r.jsonl"}, "--input is 'r.jsonl', expected a list"),
        (ReportJob, {"shown": 0}, "--shown is 0"),
        (ReportJob, {"run": "run"}, "--run is 'run', expected a Path"),
        (Launch, {"name": "fine-tune"}, "there is no stage 'fine-tune', expected one of"),
        (Launch, {"nodes": 0}, "--nodes is 0"),
        (Launch, {"nodes": 2}, "--nodes has no effect here: choose an --executor"),
        (Launch, {"name": "pipeline"}, "pipeline is several commands: choose an --executor"),
        (PlanningJob, {"precision": "int8"}, "--precision is 'int8', expected one of bf16, fp8"),
        (PlanningJob, {"layers": "te3"}, "--layers is 'te3', expected one of te, te-attention"),
        (PlanningJob, {"optimizer_state": "x"}, "--optimizer-state is .x., expected one of"),
        (PlanningJob, {"mfu": 0.0}, "--mfu is 0.0, expected a number above 0"),
        (PlanningJob, {"gpus": 0}, "--gpus is 0"),
        (PlanningJob, {"sft_records": -1}, "is -1, expected a whole number of at least 0"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be(job, change, said):
    job(**WHOLE[job])
    with pytest.raises(UserError, match=said):
        job(**WHOLE[job] | change)


def test_jobs_that_can_be():
    """A path where a text is wanted, a whole number for a number, a preset without sources."""
    assert ScoringJob(**WHOLE[ScoringJob] | {"model": Path("m")}).model_name == "m"
    assert VerificationJob("h", "c", tolerance=1).tolerance == 1
    assert InspectionJob("d", "r", method=resolve("sft")).method == resolve("sft")
    assert InspectionJob("d", "r", "s.yaml", tokens=True, method=resolve("dpo", beta=1.0)).tokens
    assert HarnessOptions(dtype="fp16").torch_dtype == "float16"
    assert PlanningJob({}, 8, sft_records=0).sft_records == 0


def test_a_sampling_job_says_each_thing_once(tmp_path):
    """At temperature 0 a prompt has one response; options of engines follow from the job."""
    given, how = WHOLE[SamplingJob], Sampling(count=8)
    job = SamplingJob(**given | {"how": how, "retries": 3, "keep_cut": True})
    assert (job.sampling, job.wanted) == (how, Wanted(8, 3, keep_cut=True))
    greedy = SamplingJob(**given | {"how": Sampling(count=8, temperature=0.0)})
    assert (greedy.sampling.count, greedy.wanted) == (1, Wanted(1, 0))
    tokenizer = TokenizerOptions(chat_template_options={"a": 1}, trust_remote_code=True)
    more = {"tokenizer": tokenizer, "on_bad_record": "skip"}
    job = SamplingJob(**given | more)
    assert job.engine_options == EngineOptions(trust_remote_code=True, skip_refused=True)
    assert job.server_options is None
    server = ServerOptions("http://localhost")
    asked = SamplingJob(**given | more | {"engine": "server", "server": server}).server_options
    assert asked is not None and asked.skip_refused and asked.template_options == {"a": 1}
    output = tmp_path / "o.jsonl"
    output.touch()
    assert sample(SamplingJob(**given | {"output": output, "part": (1, 2)}))
    with pytest.raises(UserError, match="exists: delete it"):
        sample(SamplingJob(**given | {"output": output}))


def test_folders_by_name():
    assert read_folders("--weights", ["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    for words in (["qwen"], ["qwen="], ["=x"]):
        with pytest.raises(UserError, match=r"--weights \S+: expected NAME=DIR"):
            read_folders("--weights", words)
    with pytest.raises(UserError, match="--weights a is given twice, for x and for y"):
        read_folders("--weights", ["a=x", "a=y"])
