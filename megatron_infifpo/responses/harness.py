"""lm-evaluation-harness: tasks that can be loaded, models whose weights are all there, results."""

import argparse
import os
from typing import Any

import torch

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from megatron_infifpo.responses.benchmarks import Benchmark
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer


def open_harness(tasks: set[str | None], args: argparse.Namespace) -> Any:
    """Open lm-evaluation-harness and try to load tasks, which needs their files and data.

    Raises:
        UserError: the harness, a task or its data is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm-evaluation-harness is missing: pip install lm-eval") from None
    wanted = sorted(filter(None, tasks))
    # To list the harness's own tasks takes many seconds, and the user's may not need them.
    for defaults in (False, True) if args.tasks else (True,):
        manager = TaskManager(include_path=args.tasks, include_defaults=defaults)
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


def load(folder: str, args: argparse.Namespace) -> Any:
    """Load a model into the harness.

    Args:
        folder: the model's.
        args: the command line of tools/evaluate.py.

    Raises:
        UserError: some of its weights are not there.
    """
    from lm_eval.api.registry import get_model

    named = {"batch_size": args.batch, "trust_remote_code": args.trust_remote_code}
    if args.chat_template_options:
        named["chat_template_args"] = dict(args.chat_template_options)
    if args.engine == "vllm":
        named |= {"pretrained": folder, "dtype": args.dtype, "device": cpu.device()}
        return get_model("vllm")(tensor_parallel_size=args.tensor_parallel_size, **named)
    remote = args.trust_remote_code
    # The harness would fill weights that are missing with random numbers.
    model = load_causal_lm(folder, dtype=getattr(torch, args.dtype), trust_remote_code=remote)
    rule = BatchRule(model, writes=True)
    if rule.by_length:
        print(f"{folder}: its numbers depend on the texts in a batch: one at a time", flush=True)
        named["batch_size"] = 1
        model.register_forward_pre_hook(lambda *_: rule.reset())
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    return get_model("hf")(pretrained=model.to(cpu.device()), tokenizer=tokenizer, **named)


def evaluate(
    model: Any, benchmark: Benchmark, manager: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Run one task; returns its results, and what it was made with.

    Args:
        model: from `load`.
        benchmark: the task.
        manager: from `open_harness`.
        args: the command line of tools/evaluate.py.
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
        limit=args.limit,
        confirm_run_unsafe_code=args.run_code,
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
        "batch": args.batch,
    }
