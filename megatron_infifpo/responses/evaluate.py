"""Evaluate models on benchmarks, side by side; results are kept, and used again while they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.engine.hf_model import check_folder, check_whole
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_types
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
from megatron_infifpo.responses.harness import HarnessOptions, load, open_harness, run_task
from megatron_infifpo.storage.aside import write_text


@dataclass(frozen=True)
class EvaluationJob:
    """Models and benchmarks, and where results are kept.

    Attributes:
        models: Hugging Face folders by name, in the table's order.
        output: folder of results and of table.md.
        benchmarks: some of `BENCHMARKS`, or tasks of the user's; None: all that may run.
        options: how the harness runs them.
    """

    models: Mapping[str, str]
    output: Path
    benchmarks: Sequence[str] | None = None
    options: HarnessOptions = field(default_factory=HarnessOptions)

    def __post_init__(self) -> None:
        """Refuse a table without rows.

        Raises:
            UserError: there is no model, or a field is of another type.
        """
        check_types(self)
        if not self.models:
            raise UserError("--model: expected NAME=DIR, for at least one model")


@dataclass(frozen=True)
class Cell:
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


def evaluate(job: EvaluationJob) -> str:
    """Evaluate what is missing; return the table, which OUTPUT/table.md has, too.

    Raises:
        UserError: a model, a benchmark or the harness cannot be used; or, once all is written, a
            task does not report its benchmark's metric.
    """
    chosen = choose(job)
    for folder in job.models.values():
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face folder: export the checkpoint first")
        check_folder(folder)
    cells = list_cells(job, chosen)
    missing = [cell for cell in cells if not cell.is_kept()]
    if missing:
        evaluate_missing(missing, job.options)
    scores: dict[str, dict[str, float]] = {model: {} for model in job.models}
    without = []
    for cell in cells:
        try:
            scores[cell.model][cell.name] = score_of(cell.name, read(cell.path)["results"])
        except UserError as error:
            without.append(f"{cell.model}: {error} ({cell.path} keeps them)")
    text = table(scores)
    if job.options.limit is not None:
        text += f"\n\nA rehearsal: at most {job.options.limit} questions of each."
    write_text(job.output / "table.md", text + "\n")
    if without:
        print(text)
        raise UserError("; ".join(without))
    return text


def choose(job: EvaluationJob) -> dict[str, Benchmark]:
    """Choose benchmarks by name.

    Raises:
        UserError: there is none of a name, or it runs code and that was not allowed.
    """
    options = job.options
    if options.tasks is not None and not Path(options.tasks).is_dir():
        raise UserError(f"--tasks {options.tasks} is not a folder: expected one with task files")
    if job.benchmarks is None:
        able = {
            n: b for n, b in BENCHMARKS.items() if b.task and (options.run_code or not b.runs_code)
        }
        left = ", ".join(name for name in BENCHMARKS if name not in able)
        print(f"left out: {left} (see --list and --run-code)")
        return able
    chosen = {}
    for name in job.benchmarks:
        benchmark = BENCHMARKS.get(name) or (Benchmark(name) if options.tasks else None)
        if benchmark is None or benchmark.task is None:
            known = ", ".join(n for n, b in BENCHMARKS.items() if b.task)
            raise UserError(f"there is no benchmark {name!r}: expected {known}, or --tasks DIR")
        if benchmark.runs_code and not options.run_code:
            raise UserError(
                f"{name} runs code that the model writes: pass --run-code, in a sandbox"
            )
        chosen[name] = benchmark
    return chosen


def list_cells(job: EvaluationJob, chosen: Mapping[str, Benchmark]) -> list[Cell]:
    """List what the table is made of, each with what its number follows from.

    Raises:
        UserError: a model that cannot be evaluated, or two results with one name.
    """
    # What changes speed, such as the batch, is no part of it.
    options = job.options
    flags = ("limit", "engine", "trust_remote_code", "chat_template_options")
    common = {name: getattr(options, name) for name in flags} | {"dtype": options.torch_dtype}
    tasks = {name: task_settings(name, b, options.tasks) for name, b in chosen.items()}
    cells = []
    paths: dict[str, str] = {}
    for model, folder in job.models.items():
        own = model_settings(folder, trust_remote_code=options.trust_remote_code)
        for name, benchmark in chosen.items():
            path = result_path(job.output, model, name)
            what = f"{model} on {name}"
            if other := paths.get(path.name.casefold()):
                raise UserError(f"{what} and {other} would share {path}: rename one of the models")
            paths[path.name.casefold()] = what
            settings = common | tasks[name] | own
            cells.append(Cell(model, name, folder, benchmark, path, settings))
    return cells


def evaluate_missing(missing: list[Cell], options: HarnessOptions) -> None:
    """Evaluate cell by cell, and keep each result as soon as it is there.

    Raises:
        UserError: the harness, a task, a model or a place for results is missing: before anything
            is evaluated.
    """
    manager = open_harness({cell.benchmark.task for cell in missing}, options.tasks)
    for cell in missing:
        reserve(cell.path)
    for folder in {cell.folder for cell in missing}:
        check_whole(folder, trust_remote_code=options.trust_remote_code)
    loaded: tuple[str, Any] = ("", None)
    for cell in missing:
        if loaded[0] != cell.folder:
            loaded = ("", None)  # two models would not fit
            loaded = (cell.folder, load(cell.folder, options))
        print(f"{cell.model}: {cell.name}: evaluated now", flush=True)
        found = run_task(loaded[1], cell.benchmark, manager, options)
        write(cell.path, {"settings": cell.settings, **found})
