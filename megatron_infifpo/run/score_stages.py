"""Stages that score a split under a model."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_infifpo.recipes.job import LAYOUT, scoring_words
from megatron_infifpo.run.names import PIVOT, manifest
from megatron_infifpo.run.plan import Plan
from megatron_infifpo.run.record_stages import reading
from megatron_infifpo.run.schema import Model, Source
from megatron_infifpo.run.stage import Stage, stage

TOP_K = 16


def score_title(split: str, name: str, *, top: bool = False) -> str:
    """What the stage is called that scores a split under a model."""
    which = {"preference": "", "heldout": "heldout-", "sft": "sft-"}[split]
    return f"score-{'tokens-' * top}{which}{name}"


def score(
    plan: Plan, name: str, model: Model, split: str, start: str | None = None, *, top: bool = False
) -> Stage:
    """Score a split under a model.

    Args:
        plan: of the run.
        name: of the model in it.
        model: which one, and how.
        split: of the records.
        start: the training whose checkpoint it is; None: it is the model as it was given.
        top: with the most probable tokens of chosen responses.
    """
    files, made_by = plan.files(split)
    output = plan.names.top(split, name) if top else plan.names.logprobs(split, name)
    own = _flags(plan, name, model, top=top)
    own["model"] = str(plan.names.checkpoint(start)) if start else model.model
    words = scoring_words({}, own | model.flags)
    words += ["--name", name, "--input", *files, "--output", str(output), *reading(plan.run)]
    if isinstance(model, Source) and model.domains:
        words += ["--domains", *model.domains, "--absent-domains", "mask"]
    # A checkpoint carries its tokenizer.
    given = [*([] if made_by else files), *([] if start else [model.model])]
    after = [*made_by, *([start] if start else [])]
    every, title = own["backend"] == "megatron", score_title(split, name, top=top)
    return stage(
        "score", words, after=after, made=manifest(output), inputs=given, outputs=[output],
        name=title, every_rank=every,
    )  # fmt: skip


def score_initial(
    plan: Plan, start: str, split: str, sources: Sequence[Source] = (), *, top: bool = False
) -> Iterator[Stage]:
    """Score a split under an initial pivot, and under sources.

    Args:
        plan: of the run.
        start: the training that it is the result of, or the pivot.
        split, sources, top: see `score`.
    """
    yield score(plan, start, plan.run.pivot, split, None if start == PIVOT else start, top=top)
    for source in sources:
        yield score(plan, source.name, source, split, top=top)


def _flags(plan: Plan, name: str, model: Model, *, top: bool) -> dict[str, Any]:
    backend = model.backend if isinstance(model, Source) else "megatron"
    found: dict[str, Any] = {"backend": backend}
    scoring = plan.layouts.scoring
    layout = model.layout or (scoring.get(name, scoring[PIVOT]) if backend == "megatron" else None)
    if layout is not None:
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        found |= {flag: n for flag, n in zip(LAYOUT, sizes, strict=True) if n > 1}
    if plan.run.precision == "bf16":
        found["bf16"] = True
    if top:
        found |= {"top-k": TOP_K, "top-k-responses": "chosen"}
    if model.chat_template_options:
        found["chat-template-options"] = model.chat_template_options
    return found
