"""The stages of a run: what run.yaml means as command lines, each with what it waits for.

Nothing is read or written here. Commands and their flags are those that a person would type.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_infifpo.run.checks import name_of
from megatron_infifpo.run.names import PIVOT
from megatron_infifpo.run.plan import HELDOUT, Plan
from megatron_infifpo.run.record_stages import prepare, record_stages
from megatron_infifpo.run.schema import Pivot
from megatron_infifpo.run.score_stages import score
from megatron_infifpo.run.stage import Stage, stage, words_of
from megatron_infifpo.run.train_stages import merge_stage, train_stages


def stages_of(plan: Plan, *, report: bool = True) -> list[Stage]:
    """List the stages of a run, each after those that it waits for, and each once.

    Args:
        plan: of the run.
        report: write pages about trainings, which needs matplotlib.
    """
    found: dict[str, Stage] = {}
    for each in _all(plan, report):
        found.setdefault(each.name, each)
    return list(found.values())


def _all(plan: Plan, report: bool) -> Iterator[Stage]:
    run = plan.run
    yield from record_stages(plan)
    for split in plan.splits:
        yield prepare(plan, split)
    # Sources wait for records only: they are scored before, or beside, the first training.
    for training in run.train:
        method = plan.methods[name_of(training)]
        if plan.split_of(training) == "preference" and not method.soft_targets:
            for source in plan.sources_of(training) if plan.reads_sources(training) else ():
                yield score(plan, source.name, source, "preference")
    for training in run.train:
        yield from train_stages(plan, training, report=report)
    for merge in run.merge:
        yield merge_stage(plan, merge)
    if run.data.heldout:
        yield from _heldout(plan)
    if run.evaluation.benchmarks:
        yield _evaluate(plan)


def _heldout(plan: Plan) -> Iterator[Stage]:
    """Score held-out records under every model that comes out, and the pivot."""
    run = plan.run
    yield prepare(plan, HELDOUT)
    yield score(plan, PIVOT, run.pivot, HELDOUT)
    for training in run.train:
        name = name_of(training)
        yield score(plan, name, run.pivot, HELDOUT, name)
    for merge in run.merge:
        exported = {"model": str(plan.names.exported(merge.name))}
        merged = Pivot.model_validate(run.pivot.model_dump() | exported)
        made = score(plan, merge.name, merged, HELDOUT)
        inputs = tuple(path for path in made.inputs if path != merged.model)
        yield replace(made, after=(*made.after, f"merge-{merge.name}"), inputs=inputs)
    for source in run.sources if run.evaluation.sources else ():
        yield score(plan, source.name, source, HELDOUT)


def _evaluate(plan: Plan) -> Stage:
    """Run benchmarks on the pivot and on every exported model."""
    run, output = plan.run, plan.names.output / "evaluation"
    exported = [name_of(each) for each in run.train if plan.exports(each)]
    merged = [merge.name for merge in run.merge]
    words: list[Any] = ["--output", output, "--benchmarks", *run.evaluation.benchmarks]
    words += ["--model", f"{PIVOT}={run.pivot.model}"]
    for name in (*exported, *merged):
        words += ["--model", f"{name}={plan.names.exported(name)}"]
    words += words_of(run.evaluation.flags)
    after = [*(f"export-{name}" for name in exported), *(f"merge-{name}" for name in merged)]
    made, given = output / "table.md", [run.pivot.model]
    return stage("evaluate", words, after=after, made=made, inputs=given, outputs=[output])
