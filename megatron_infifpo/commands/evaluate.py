"""Evaluate exported models on the paper's benchmarks, side by side, by lm-evaluation-harness.

    infifpo evaluate --model base=models/phi-4 --model fused=runs/phi4/infifpo-hf \\
        --engine vllm --tensor-model-parallel-size 2 --output runs/phi4/evaluation
    infifpo evaluate --list

Needs `pip install megatron-infifpo[evaluate]`, and the benchmarks' data sets: the harness downloads
them, or finds them in its cache. Results are kept in OUTPUT by model and benchmark, and used again
where nothing changed that they follow from: weights, configuration, tokenizer, chat template and
generation settings of the model, task files and local data, the harness's version, and the flags
that change numbers. Each line of the output says so. OUTPUT/table.md is written anew each time.
MBPP and HumanEval run code that the model writes: only with --run-code, in a sandbox of yours.
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import (
    fields_of,
    read_folders,
    read_options,
    take_defaults,
)
from megatron_infifpo.commands.response_flags import add_engine_flags
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.responses.benchmarks import BENCHMARKS
from megatron_infifpo.responses.evaluate import EvaluationJob, evaluate
from megatron_infifpo.responses.harness import DTYPES, ENGINES, HarnessOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add models, benchmarks, and how they are run."""
    parser.add_argument("--list", action="store_true", help="print the benchmarks and exit")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR")
    parser.add_argument(
        "--benchmarks", nargs="+", metavar="NAME", help="some of --list, or tasks of --tasks"
    )
    parser.add_argument("--tasks", metavar="DIR", help="task files of your own, in YAML")
    add_engine_flags(parser, ENGINES)
    parser.add_argument(
        "--batch", type=batch, help="requests at once, or auto (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=positive, help="only so many questions of each: a rehearsal"
    )
    parser.add_argument(
        "--chat-template-options",
        metavar="JSON",
        help="""for the models' chat templates, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument("--run-code", action="store_true", help="run code that the model writes")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a model"
    )
    parser.add_argument("--dtype", type=dtype, choices=[*DTYPES], help="(default: %(default)s)")
    take_defaults(parser, HarnessOptions)


def run(args: argparse.Namespace) -> None:
    """List the benchmarks; or evaluate what is missing, and print the table."""
    if args.list:
        show()
        return
    templates = {"chat_template_options": read_options(args.chat_template_options)}
    options = HarnessOptions(**fields_of(args, HarnessOptions) | templates)
    models = read_folders("--model", args.model)
    print(evaluate(EvaluationJob(models, args.output, args.benchmarks, options)))


def dtype(text: str) -> str:
    """Read --dtype, which had PyTorch's names once."""
    return next((short for short, name in DTYPES.items() if name == text), text)


def batch(text: str) -> int | str:
    """Read --batch."""
    return text if text == "auto" else whole(1)(text)


def show() -> None:
    """Print every benchmark, its task and its setting."""
    for name, benchmark in BENCHMARKS.items():
        task = benchmark.task or "none"
        shots = "" if benchmark.shots is None else f"{benchmark.shots} examples"
        print(f"{name:<12}{task:<22}{shots:<12}{benchmark.note}".rstrip())
