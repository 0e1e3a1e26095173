"""What pydantic cannot see: names that must be there, methods, and what belongs together."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_infifpo.run.schema import Run, Training

Wrong = tuple[tuple[str | int, ...], str]
"""Where a mistake is, and what it is."""
PIVOT = "pivot"
# Folders and files of a run.
RESERVED = (PIVOT, "data", "evaluation", "logprobs", "responses", "sources", "stages", "tokens")


def wrong_in(run: Run) -> Iterator[Wrong]:
    """Yield every mistake of a run whose fields are of the right types."""
    yield from _sources(run)
    yield from _data(run)
    yield from _trainings(run)
    yield from _merges(run)
    if run.cluster.executor == "slurm" and run.cluster.ranks is None:
        yield ("cluster",), "ranks is missing: the ranks of a node, one a GPU, that jobs ask for"
    if run.cluster.executor == "local" and run.cluster.nodes > 1:
        yield ("cluster", "nodes"), "nodes above 1 need executor: slurm"


def name_of(training: Training) -> str:
    """What a training is called."""
    return training.name or training.method


def _twice(names: Iterable[str], part: str) -> Iterator[Wrong]:
    seen = set[str]()
    for number, name in enumerate(names):
        if name in seen:
            yield (part, number), f"the name {name} is used twice, expected unique names"
        seen.add(name)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    return f"there is no {what} {name!r}, {expected}"


def _sources(run: Run) -> Iterator[Wrong]:
    names = [source.name for source in run.sources]
    yield from _twice(names, "sources")
    for number, source in enumerate(run.sources):
        if source.name in (PIVOT, "initial"):
            yield ("sources", number, "name"), f"{source.name} is the pivot's own name"
        if source.backend != "megatron" and source.layout and source.backend == "transformers":
            yield ("sources", number, "layout"), "has no effect with backend: transformers"
    weighted = [PIVOT] * (run.pivot.weight is not None)
    weighted += [source.name for source in run.sources if source.weight is not None]
    if weighted and len(weighted) < 1 + len(names):
        without = [name for name in (PIVOT, *names) if name not in weighted]
        yield ("sources",), f"there are weights, but not of {', '.join(without)}"


def _data(run: Run) -> Iterator[Wrong]:
    for field in ("pairs", "sft", "heldout"):
        for number, name in enumerate(getattr(run.data, field)):
            if not Path(name).exists():
                yield ("data", field, number), f"{name} is not there"
    for number, name in enumerate(run.data.prompts):
        file = name if Path(name).exists() else name.rpartition("=")[0]
        if not Path(file).exists():
            yield ("data", "prompts", number), f"{name} is not there, expected FILE or FILE=COUNT"
    if run.data.prompts and run.labels is None:
        yield ("data", "prompts"), "responses to prompts need a judge: labels is missing"
    known = [PIVOT, *(source.name for source in run.sources)]
    for number, name in enumerate(run.sampling.models):
        if name not in known:
            yield ("sampling", "models", number), _unknown("model", name, known)


def _trainings(run: Run) -> Iterator[Wrong]:
    from megatron_infifpo.methods import METHODS  # here: it imports torch

    names = [name_of(training) for training in run.train]
    yield from _twice(names, "train")
    before = [PIVOT]
    for number, training in enumerate(run.train):
        place = ("train", number)
        if training.method not in METHODS:
            yield (*place, "method"), _unknown("method", training.method, METHODS)
            continue
        method = METHODS[training.method]
        if names[number] in RESERVED or names[number].endswith("-hf"):
            yield place, f"{names[number]} is a name that the run's folder has for something else"
        if training.start is not None and training.start not in before:
            yield (*place, "start"), _unknown("training before it", training.start, before)
        if training.data == "sft" and method.reference is not None:
            yield (*place, "data"), f"{training.method} is trained on preference records"
        known = [source.name for source in run.sources]
        for position, name in enumerate(training.sources or ()):
            if name not in known:
                yield (*place, "sources", position), _unknown("source", name, known)
        if method.reference == "fused" and not run.sources:
            yield place, f"{training.method} needs sources, and there are none"
        if method.soft_targets and not run.sources:
            yield place, f"{training.method} learns from sources, and there are none"
        before.append(names[number])


def _merges(run: Run) -> Iterator[Wrong]:
    trained = [name_of(training) for training in run.train]
    taken = [*trained, *RESERVED]
    for number, merge in enumerate(run.merge):
        if merge.name in taken:
            yield ("merge", number, "name"), f"the name {merge.name} is used twice"
        taken.append(merge.name)
        for position, name in enumerate(merge.models):
            if name not in trained:
                yield ("merge", number, "models", position), _unknown("training", name, trained)
