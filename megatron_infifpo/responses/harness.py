"""lm-evaluation-harness: tasks that can be loaded, models whose weights are all there, results."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_positive, check_types
from megatron_infifpo.patches import cpu
from megatron_infifpo.responses.benchmarks import Benchmark
from megatron_infifpo.tokens.dates import with_one_date
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class HarnessOptions:
    """How the harness runs models and tasks.

    Attributes:
        engine: one of `ENGINES`.
        tensor_model_parallel_size: GPUs of a model, of vLLM.
        dtype: of the weights, a key of `DTYPES`.
        batch: requests at once, or "auto".
        limit: only so many questions of each task.
        tasks: folder with task files of the user's.
        chat_template_options: variables for the models' templates.
        run_code: run what the model writes.
        trust_remote_code: run code that comes with a model.
    """

    engine: str = "transformers"
    tensor_model_parallel_size: int = 1
    dtype: str = "bf16"
    batch: int | str = "auto"
    limit: int | None = None
    tasks: str | None = None
    chat_template_options: Mapping[str, Any] = field(default_factory=dict)
    run_code: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the harness.

        Raises:
            UserError: an unknown choice, or a number that is none.
        """
        check_types(self)
        check_choice("engine", self.engine, ENGINES)
        check_choice("dtype", self.dtype, DTYPES)
        check_positive(self, "tensor_model_parallel_size", "limit")
        if self.batch != "auto":
            check_positive(self, "batch")

    @property
    def torch_dtype(self) -> str:
        """The dtype, as PyTorch calls it."""
        return DTYPES[self.dtype]


def open_harness(tasks: set[str | None], folder: str | None = None) -> Any:
    """Open lm-evaluation-harness and try to load tasks, which needs their files and data.

    Args:
        tasks: names.
        folder: with task files of the user's.

    Raises:
        UserError: the harness, a task or its data is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm-evaluation-harness is missing: pip install lm-eval") from None
    wanted = sorted(filter(None, tasks))
    # To list the harness's own tasks takes many seconds, and the user's may not need them.
    for defaults in (False, True) if folder else (True,):
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        problem = next(filter(None, (_problem(manager, task) for task in wanted)), "")
        if not problem:
            return manager
    raise UserError(f"{problem}; see --list and --tasks")


def _problem(manager: Any, task: str) -> str:
    """Why a task cannot be loaded; nothing if it can."""
    if task not in manager.all_tasks:
        return f"there is no task {task!r}"
    if task in manager.all_tags:
        return f"{task!r} is a tag of several tasks, without a score of its own: name its tasks"
    try:
        manager.load([task])
    except Exception as error:  # it runs task files of the user's, and downloads
        return (
            f"the harness cannot load the task {task!r} ({type(error).__name__}: {error}): mend "
            "its files, or fetch its data set"
        )
    return ""


def load(folder: str, options: HarnessOptions) -> Any:
    """Load a model, from its folder, into the harness.

    Raises:
        UserError: some of its weights are not there.
    """
    from lm_eval.api.registry import get_model

    named: dict[str, Any] = {
        "batch_size": options.batch,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.chat_template_options:
        named["chat_template_args"] = dict(options.chat_template_options)
    if options.engine == "vllm":
        named |= {"pretrained": folder, "dtype": options.torch_dtype, "device": cpu.device()}
        return get_model("vllm")(tensor_parallel_size=options.tensor_model_parallel_size, **named)
    remote = options.trust_remote_code
    # The harness would fill weights that are missing with random numbers.
    model = load_causal_lm(
        folder, dtype=getattr(torch, options.torch_dtype), trust_remote_code=remote
    )
    rule = BatchRule(model, writes=True)
    if rule.by_length:
        print(f"{folder}: its numbers depend on the texts in a batch: one at a time", flush=True)
        named["batch_size"] = 1
        model.register_forward_pre_hook(lambda *_: rule.reset())
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    if tokenizer.chat_template:
        # The same results tomorrow.
        tokenizer.chat_template = with_one_date(tokenizer.get_chat_template())
    return get_model("hf")(pretrained=model.to(cpu.device()), tokenizer=tokenizer, **named)


def run_task(
    model: Any, benchmark: Benchmark, manager: Any, options: HarnessOptions
) -> dict[str, Any]:
    """Run one task; returns its results, and what it was made with.

    Args:
        model: from `load`.
        benchmark: the task.
        manager: from `open_harness`.
        options: its limit counts, and whether code may run.
    """
    import lm_eval
    import transformers

    if benchmark.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the user has said so
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[benchmark.task],
        num_fewshot=benchmark.shots,
        task_manager=manager,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        limit=options.limit,
        confirm_run_unsafe_code=options.run_code,
        log_samples=False,
    )["results"]
    # Whatever the harness calls them, results are kept.
    results = found.get(
        benchmark.task, {f"{t}: {k}": v for t in found for k, v in found[t].items()}
    )
    versions = {name.__name__: name.__version__ for name in (lm_eval, torch, transformers)}
    return {
        "results": {name: value for name, value in results.items() if name != "alias"},
        "versions": {name: str(version) for name, version in versions.items()},
        "batch": options.batch,
    }
