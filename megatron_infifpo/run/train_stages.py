"""Stages of a training: its initial pivot's log-probs, soft targets, steps, export, page."""

from collections.abc import Iterator
from typing import Any

from megatron_infifpo.recipes.commands import training_words
from megatron_infifpo.recipes.job import Job
from megatron_infifpo.run.checks import name_of
from megatron_infifpo.run.names import PIVOT, manifest
from megatron_infifpo.run.plan import Plan
from megatron_infifpo.run.schema import Merge, Training
from megatron_infifpo.run.score_stages import score_initial, score_title
from megatron_infifpo.run.stage import Stage, stage, without, words_of
from megatron_infifpo.storage.checkpoints import TRACKER


def train_stages(plan: Plan, training: Training, *, report: bool) -> Iterator[Stage]:
    """Yield what a training needs beside records and sources, itself, and what it leaves.

    Args:
        plan: of the run.
        training: which one.
        report: write a page about it.
    """
    name, split = name_of(training), plan.split_of(training)
    start, method = plan.starts[name], plan.methods[name]
    after, more = [f"prepare-{split}"], list[str]()
    if method.soft_targets:
        yield from score_initial(plan, start, split, plan.sources_of(training), top=True)
        yield _fuse(plan, training)
        after.append(f"fuse-{name}")
        more = ["--soft-targets", str(plan.names.targets(name))]
    elif split == "preference" and (method.reads_logprobs or plan.reads_sources(training)):
        yield from score_initial(plan, start, split)
        read = plan.sources_of(training) if plan.reads_sources(training) else []
        after += [score_title(split, each) for each in (start, *(one.name for one in read))]
        more = ["--preference-sources", str(plan.names.sources(name))]
    yield _train(plan, training, after, more)
    if plan.exports(training):
        yield from _export(plan, name)
    if report and split == "preference":
        save = plan.names.checkpoint(name)
        made = save / "report.html"
        yield stage("report", [save], after=[name], made=made, name=f"report-{name}")


def _train(plan: Plan, training: Training, after: list[str], more: list[str]) -> Stage:
    run, names, name = plan.run, plan.names, name_of(training)
    start, save = plan.starts[name], names.checkpoint(name)
    given = run.pivot.model if start == PIVOT else str(names.checkpoint(start))
    data = ["--preference-data", str(names.tokens(plan.split_of(training))), *more]
    words = training_words(
        training.method, data, given, str(save), layout=plan.layouts.training[name],
        beta=training.beta, bf16=run.precision == "bf16", epochs=training.epochs, lr=training.lr,
        global_batch_size=training.global_batch_size, seq_length=training.seq_length,
        save_interval=training.save_interval,
    )  # fmt: skip
    words += ["--lora-rank", str(training.lora_rank)] if training.lora_rank else []
    words = without(words, training.flags) + words_of(training.flags)
    waits = after if start == PIVOT else [*after, start]
    inputs = (given,) if start == PIVOT else ()
    job = Job(name, ("train", *words), every_rank=True)
    return Stage(job, tuple(waits), save / TRACKER, inputs, (save,), trains=True)


def _fuse(plan: Plan, training: Training) -> Stage:
    """Fuse what the sources say of tokens."""
    name, split = name_of(training), plan.split_of(training)
    output = plan.names.targets(name)
    words: list[Any] = ["--data", plan.names.tokens(split)]
    words += ["--sources", plan.names.sources(name), "--output", output]
    spread = "top_values" in plan.methods[name].reads
    words += ["--fusion", "none"] if spread else ["--fusion", "mince", "--include-initial"]
    models = [plan.starts[name], *(source.name for source in plan.sources_of(training))]
    after = [f"prepare-{split}", *(score_title(split, each, top=True) for each in models)]
    made, title = manifest(output), f"fuse-{name}"
    return stage("fuse-targets", words, after=after, made=made, outputs=[output], name=title)


def _export(plan: Plan, name: str) -> Iterator[Stage]:
    """Export a training, and compare what comes out with it."""
    load, save, export = plan.names.checkpoint(name), plan.names.exported(name), f"export-{name}"
    made, words = save / "config.json", ["--load", load, "--save", save]
    yield stage("export", words, after=[name], made=made, outputs=[save], name=export)
    # In float32 whatever the precision, a layer at a time: any model fits, and nothing is rounded.
    check = ["--hf", save, "--load", load, "--by-layers"]
    yield stage("verify", check, after=[name, export], made=None, name=f"verify-{name}")


def merge_stage(plan: Plan, merge: Merge) -> Stage:
    """Merge exported trainings by what they have changed of what all of them start from."""
    start, save = plan.base_of(merge), plan.names.exported(merge.name)
    base = plan.run.pivot.model if start == PIVOT else plan.names.exported(start)
    words: list[Any] = ["--method", merge.method, "--base", base, "--models"]
    words += [*map(plan.names.exported, merge.models), "--output", save, *words_of(merge.flags)]
    after = [f"export-{name}" for name in (start, *merge.models) if name != PIVOT]
    inputs, made = [plan.run.pivot.model] if start == PIVOT else [], save / "config.json"
    title = f"merge-{merge.name}"
    return stage("merge", words, after=after, made=made, inputs=inputs, outputs=[save], name=title)
