"""Stages from prompts or records to what is scored: sample, label, split, prepare."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_infifpo.run.names import PIVOT, manifest
from megatron_infifpo.run.plan import Plan
from megatron_infifpo.run.schema import Model, Run, Source
from megatron_infifpo.run.stage import Stage, stage, template_words, words_of


def record_stages(plan: Plan) -> Iterator[Stage]:
    """Yield those that make records."""
    if plan.run.data.prompts:
        yield from _sample(plan)
        yield _label(plan)
    if plan.splitting():
        files, after = plan.all_records()
        made = [plan.names.records(split) for split in ("sft", "preference")]
        words: list[Any] = ["--input", *files, "--sft", made[0], "--preference", made[1]]
        words += ["--share", plan.run.data.sft_share, "--seed", plan.run.data.seed]
        words += reading(plan.run)
        given = [] if after else files
        yield stage("split", words, after=after, made=made[1], inputs=given, outputs=made)


def prepare(plan: Plan, split: str) -> Stage:
    """Tokenize a split for the pivot."""
    files, after = plan.files(split)
    prefix, pivot = plan.names.tokens(split), plan.run.pivot
    words: list[Any] = ["--input", *files, "--tokenizer", pivot.model, "--output", prefix]
    words += [*reading(plan.run), *template_words(pivot), *words_of(pivot.prepare_flags)]
    given = [*([] if after else files), pivot.model]
    made, name = manifest(prefix), f"prepare-{split}"
    return stage(
        "prepare", words, after=after, made=made, inputs=given, outputs=[prefix], name=name
    )


def reading(run: Run) -> list[str]:
    """Flags of every command that reads records."""
    lists = ["--lists"] if run.data.lists else []
    skip = run.data.on_bad_record
    return [*lists, *(["--on-bad-record", skip] if skip != "stop" else [])]


def _models(run: Run) -> dict[str, Model]:
    """Those that answer prompts, by name."""
    models: dict[str, Model] = {PIVOT: run.pivot} | {each.name: each for each in run.sources}
    return {name: models[name] for name in run.sampling.models or models}


def _sample(plan: Plan) -> Iterator[Stage]:
    run = plan.run
    files = [f if Path(f).exists() else f.rpartition("=")[0] for f in run.data.prompts]
    for name, model in _models(run).items():
        output = plan.names.responses(name)
        count = run.sampling.pivot_count if name == PIVOT else run.sampling.source_count
        words: list[Any] = ["--model", model.model, "--name", name, "--engine"]
        words += [run.sampling.engine, "--count", count, "--output", output]
        words += ["--input", *run.data.prompts, *template_words(model)]
        words += ["--bf16"] if run.precision == "bf16" else []
        if isinstance(model, Source) and model.domains:
            words += ["--domains", *model.domains]
        words += words_of(run.sampling.flags)
        given, title = [model.model, *files], f"sample-{name}"
        yield stage("sample", words, made=output, inputs=given, name=title)


def _label(plan: Plan) -> Stage:
    labels, names = plan.run.labels, list(_models(plan.run))
    assert labels is not None
    words: list[Any] = ["--input", *map(plan.names.responses, names)]
    output = plan.names.responses("records")
    words += ["--output", output, *(["--pivot", PIVOT] if PIVOT in names else [])]
    words += ["--list", labels.list] if labels.list else []
    judge = labels.reward_model or str(labels.program)
    words += ["--reward-model" if labels.reward_model else "--program", judge]
    words += words_of(labels.flags)
    given = [labels.reward_model or judge.rpartition(":")[0]]
    after = [f"sample-{name}" for name in names]
    return stage("label", words, after=after, made=output, inputs=given)
