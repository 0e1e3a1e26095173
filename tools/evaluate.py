#!/usr/bin/env python
"""Evaluate exported models on the paper's benchmarks, side by side, by lm-evaluation-harness.

    python tools/evaluate.py --model base=models/phi-4 --model fused=runs/phi4/infifpo-hf \\
        --engine vllm --tensor-parallel-size 2 --output runs/phi4/evaluation
    python tools/evaluate.py --list

Needs `pip install megatron-infifpo[evaluate]`, and the benchmarks' data sets: the harness downloads
them, or finds them in its cache. Results are kept in OUTPUT by model and benchmark, and used again
where weights and settings are the same; OUTPUT/table.md is written anew each time. MBPP and
HumanEval run code that the model writes: only with --run-code, in a sandbox of yours.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_infifpo import cpu
from megatron_infifpo.checkpoint.fingerprint import weights_fingerprint
from megatron_infifpo.cli import UserError, run
from megatron_infifpo.data.documents import publish
from megatron_infifpo.responses.benchmarks import BENCHMARKS, Benchmark, score_of, table


def main() -> None:
    """Parse the command line, evaluate what is missing, and print the table."""
    args = parse()
    if args.list:
        show()
        return
    chosen = choose(args)
    models = dict(text.partition("=")[::2] for text in args.model)
    if not models or not all(models.values()):
        raise UserError("--model: expected NAME=DIR, for at least one model")
    for folder in models.values():
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face folder: export the checkpoint first")
    args.output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    for model, folder in models.items():
        scores[model] = {}
        loaded: Any = None
        weights = weights_fingerprint(folder)
        for name, benchmark in chosen.items():
            path = args.output / f"{model}-{name}.json"
            settings = {"task": benchmark.task, "shots": benchmark.shots, "limit": args.limit}
            settings |= {"weights_sha256": weights, "dtype": args.dtype, "engine": args.engine}
            found = read(path)
            if found.get("settings") != settings:
                loaded = loaded or load(folder, args)
                print(f"{model}: {name}", flush=True)
                found = {"settings": settings, **evaluate(loaded, benchmark, args)}
                write(path, found)
            scores[model][name] = score_of(name, found["results"])
    text = table(scores)
    (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the benchmarks and exit")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR")
    parser.add_argument(
        "--benchmarks", nargs="+", metavar="NAME", help="some of --list, or tasks of --tasks"
    )
    parser.add_argument("--tasks", metavar="DIR", help="task files of your own, in YAML")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of vLLM")
    parser.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--batch", default="auto", help="requests at once (default: auto)")
    parser.add_argument("--limit", type=int, help="only so many questions of each: a rehearsal")
    parser.add_argument("--run-code", action="store_true", help="run code that the model writes")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args()


def show() -> None:
    """Print every benchmark, its task and its setting."""
    for name, benchmark in BENCHMARKS.items():
        task = benchmark.task or "none"
        shots = "" if benchmark.shots is None else f"{benchmark.shots} examples"
        print(f"{name:<12}{task:<22}{shots:<12}{benchmark.note}".rstrip())


def choose(args: argparse.Namespace) -> dict[str, Benchmark]:
    """Choose benchmarks by name.

    Raises:
        UserError: there is none of a name, or it runs code and that was not allowed.
    """
    if args.benchmarks is None:
        able = {
            n: b for n, b in BENCHMARKS.items() if b.task and (args.run_code or not b.runs_code)
        }
        left = ", ".join(BENCHMARKS.keys() - able.keys())
        print(f"left out: {left} (see --list and --run-code)")
        return able
    chosen = {}
    for name in args.benchmarks:
        benchmark = BENCHMARKS.get(name) or (Benchmark(name) if args.tasks else None)
        if benchmark is None or benchmark.task is None:
            known = ", ".join(n for n, b in BENCHMARKS.items() if b.task)
            raise UserError(f"there is no benchmark {name!r}: expected {known}, or --tasks DIR")
        if benchmark.runs_code and not args.run_code:
            raise UserError(
                f"{name} runs code that the model writes: pass --run-code, in a sandbox"
            )
        chosen[name] = benchmark
    return chosen


def load(folder: str, args: argparse.Namespace) -> Any:
    """Load a model into the harness.

    Raises:
        UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.registry import get_model
    except ImportError:
        raise UserError("lm-evaluation-harness is missing: pip install lm-eval") from None
    options = {"pretrained": folder, "dtype": args.dtype, "batch_size": args.batch}
    options["trust_remote_code"] = args.trust_remote_code
    options["device"] = cpu.device()
    if args.engine == "vllm":
        options["tensor_parallel_size"] = args.tensor_parallel_size
    return get_model("hf" if args.engine == "transformers" else "vllm")(**options)


def evaluate(model: Any, benchmark: Benchmark, args: argparse.Namespace) -> dict[str, Any]:
    """Run one task; returns its results, settings and versions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if benchmark.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the user has said so
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[benchmark.task],
        num_fewshot=benchmark.shots,
        task_manager=TaskManager(include_path=args.tasks),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        limit=args.limit,
        confirm_run_unsafe_code=args.run_code,
        log_samples=False,
    )
    results = {k: v for k, v in found["results"][benchmark.task].items() if k != "alias"}
    return {"results": results, "lm_eval": lm_eval.__version__}


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote, or nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    aside = Path(f"{path}.partial")
    aside.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    publish(str(path))


if __name__ == "__main__":
    run(main)
