#!/usr/bin/env python
"""Evaluate exported models on the paper's benchmarks, side by side, by lm-evaluation-harness.

    python tools/evaluate.py --model base=models/phi-4 --model fused=runs/phi4/infifpo-hf \\
        --engine vllm --tensor-parallel-size 2 --output runs/phi4/evaluation
    python tools/evaluate.py --list

Needs `pip install megatron-infifpo[evaluate]`, and the benchmarks' data sets: the harness downloads
them, or finds them in its cache. Results are kept in OUTPUT by model and benchmark, and used again
where nothing changed that they follow from: weights, configuration, tokenizer, chat template and
generation settings of the model, task files and local data, the harness's version, and the flags
that change numbers. Each line of the output says so. OUTPUT/table.md is written anew each time.
MBPP and HumanEval run code that the model writes: only with --run-code, in a sandbox of yours.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.commands.entry import run
from megatron_infifpo.engine.hf_model import check_folder, check_whole
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.responses.benchmarks import BENCHMARKS, Benchmark, score_of, table
from megatron_infifpo.responses.evaluation import (
    changes,
    model_settings,
    read,
    reserve,
    result_path,
    task_settings,
    write,
)
from megatron_infifpo.responses.harness import evaluate, load, open_harness


@dataclass(frozen=True)
class Wanted:
    """One cell of the table.

    Attributes:
        model, name: of the model and of the benchmark.
        folder: of the model.
        benchmark: the benchmark.
        path: where the result is kept.
        settings: what it follows from.
    """

    model: str
    name: str
    folder: str
    benchmark: Benchmark
    path: Path
    settings: dict[str, Any]

    def is_kept(self) -> bool:
        """Whether there is a result that still holds; says so, or what changed."""
        found = read(self.path)
        different = changes(found.get("settings", {}), self.settings)
        if found and not different:
            print(f"{self.model}: {self.name}: used again: {self.path}", flush=True)
        elif found:
            print(f"{self.model}: {self.name}: evaluated again: {', '.join(different)} changed")
        return bool(found) and not different


def main() -> None:
    """Parse the command line, evaluate what is missing, and print the table."""
    args = parse()
    if args.list:
        show()
        return
    chosen = choose(args)
    models = read_models(args.model)
    cells = list_cells(models, chosen, args)
    missing = [cell for cell in cells if not cell.is_kept()]
    if missing:
        evaluate_missing(missing, args)
    scores: dict[str, dict[str, float]] = {model: {} for model in models}
    without = []
    for cell in cells:
        try:
            scores[cell.model][cell.name] = score_of(cell.name, read(cell.path)["results"])
        except UserError as error:
            without.append(f"{cell.model}: {error} ({cell.path} keeps them)")
    text = table(scores)
    if args.limit is not None:
        text += f"\n\nA rehearsal: at most {args.limit} questions of each."
    (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if without:
        raise UserError("; ".join(without))


def read_models(texts: list[str]) -> dict[str, str]:
    """Read --model NAME=DIR; returns the folders by name, in order.

    Raises:
        UserError: not of that form, a name twice, or not a model's folder.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"--model {text}: expected NAME=DIR")
        if name in models:
            raise UserError(
                f"--model {name} is given twice, for {models[name]} and for {folder}: expected "
                "names that differ"
            )
        models[name] = folder
    if not models:
        raise UserError("--model: expected NAME=DIR, for at least one model")
    for folder in models.values():
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face folder: export the checkpoint first")
        check_folder(folder)
    return models


def list_cells(
    models: dict[str, str], chosen: dict[str, Benchmark], args: argparse.Namespace
) -> list[Wanted]:
    """List what the table is made of, each with what its number follows from.

    Raises:
        UserError: a model that cannot be evaluated, or two results with one name.
    """
    # What changes speed, such as the batch, is no part of it.
    flags = ("limit", "dtype", "engine", "trust_remote_code", "chat_template_options")
    common = {name: getattr(args, name) for name in flags}
    tasks = {name: task_settings(name, b, args.tasks) for name, b in chosen.items()}
    cells = []
    paths: dict[str, str] = {}
    for model, folder in models.items():
        own = model_settings(folder, trust_remote_code=args.trust_remote_code)
        for name, benchmark in chosen.items():
            path = result_path(args.output, model, name)
            what = f"{model} on {name}"
            if other := paths.get(path.name.casefold()):
                raise UserError(f"{what} and {other} would share {path}: rename one of the models")
            paths[path.name.casefold()] = what
            settings = common | tasks[name] | own
            cells.append(Wanted(model, name, folder, benchmark, path, settings))
    return cells


def evaluate_missing(missing: list[Wanted], args: argparse.Namespace) -> None:
    """Evaluate cell by cell, and keep each result as soon as it is there.

    Raises:
        UserError: the harness, a task, a model or a place for results is missing: before anything
            is evaluated.
    """
    manager = open_harness({cell.benchmark.task for cell in missing}, args)
    for cell in missing:
        reserve(cell.path)
    for folder in {cell.folder for cell in missing}:
        check_whole(folder, trust_remote_code=args.trust_remote_code)
    loaded: tuple[str, Any] = ("", None)
    for cell in missing:
        if loaded[0] != cell.folder:
            loaded = ("", None)  # two models would not fit
            loaded = (cell.folder, load(cell.folder, args))
        print(f"{cell.model}: {cell.name}: evaluated now", flush=True)
        found = evaluate(loaded[1], cell.benchmark, manager, args)
        write(cell.path, {"settings": cell.settings, **found})


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
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="of vLLM")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="(default: bfloat16)",
    )
    parser.add_argument(
        "--batch", type=batch, default="auto", help="requests at once, or auto (default: auto)"
    )
    parser.add_argument(
        "--limit", type=positive, help="only so many questions of each: a rehearsal"
    )
    parser.add_argument(
        "--chat-template-options",
        type=options,
        default={},
        metavar="JSON",
        help="""for the models' chat templates, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument("--run-code", action="store_true", help="run code that the model writes")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args()


def batch(text: str) -> int | str:
    """Read --batch."""
    return text if text == "auto" else whole(1)(text)


def options(text: str) -> dict[str, Any]:
    """Read --chat-template-options."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a JSON object")
    return found


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
    if args.tasks is not None and not Path(args.tasks).is_dir():
        raise UserError(f"--tasks {args.tasks} is not a folder: expected one with task files")
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


if __name__ == "__main__":
    run(main)
