"""What follows from a run.yaml, and its stages ask for: splits, starts, sources, layouts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.run.checks import name_of
from megatron_infifpo.run.names import PIVOT, Names
from megatron_infifpo.run.schema import Layout, Merge, Run, Source, Training

HELDOUT = "heldout"


@dataclass(frozen=True)
class Layouts:
    """Layouts that were chosen for the GPUs that are there.

    Attributes:
        training: flags of `infifpo train`, by the training's name.
        scoring: layouts by the model's name; `pivot` is that of the pivot and all that it becomes.
    """

    training: Mapping[str, tuple[str, ...]]
    scoring: Mapping[str, Layout]


class Plan:
    """A run, and what follows from it.

    Attributes:
        run: what it is.
        layouts: of what it trains and scores.
        names: of its files.
        methods: of every training, by its name.
        starts: what every training starts from, by name: an earlier one, or the pivot.
        splits: of records that it trains on: `sft`, `preference`, or both.
    """

    def __init__(self, run: Run, layouts: Layouts) -> None:
        """Find out."""
        from megatron_infifpo.methods import METHODS  # here: it imports torch

        self.run, self.layouts, self.names = run, layouts, Names(Path(run.output))
        self.methods = {name_of(one): METHODS[one.method] for one in run.train}
        used = {self.split_of(one) for one in run.train}
        self.splits = [split for split in ("sft", "preference") if split in used]
        self.starts = self._starts()

    def _starts(self) -> dict[str, str]:
        """Without other words a training starts from the first SFT before it."""
        found: dict[str, str] = {}
        first: str | None = None
        for one in self.run.train:
            name = name_of(one)
            found[name] = one.start or first or PIVOT
            if one.method == "sft" and first is None and one.start is None:
                first = name
        return found

    def base_of(self, merge: Merge) -> str:
        """What all models of a merge were trained from: the last such training, or the pivot."""
        lines = [list(self._line_of(name)) for name in merge.models]
        return next(name for name in lines[0] if all(name in line for line in lines))

    def _line_of(self, name: str) -> Iterator[str]:
        """What a training starts from, what that starts from, and so on to the pivot."""
        while name != PIVOT:
            name = self.starts[name]
            yield name

    def split_of(self, training: Training) -> str:
        """Which records a training is trained on."""
        usual = "sft" if self.methods[name_of(training)].reference is None else "preference"
        return training.data or usual

    def sources_of(self, training: Training) -> list[Source]:
        """The sources that a training may learn from."""
        names = training.sources
        return [each for each in self.run.sources if names is None or each.name in names]

    def reads_sources(self, training: Training) -> bool:
        """Whether it reads their log-probs, of pairs."""
        method = self.methods[name_of(training)]
        return method.reads_sources or "pair-weights" in training.flags

    def splitting(self) -> bool:
        """Whether records are split in two."""
        return not self.run.data.sft and len(self.splits) > 1

    def files(self, split: str) -> tuple[list[str], tuple[str, ...]]:
        """Files of a split's records, and the stages that make them; none for what is given."""
        data = self.run.data
        if split == HELDOUT:
            return list(data.heldout), ()
        if split == "sft" and data.sft:
            return list(data.sft), ()
        if self.splitting():
            return [str(self.names.records(split))], ("split",)
        return self.all_records()

    def all_records(self) -> tuple[list[str], tuple[str, ...]]:
        """Files of all records, and the stage that makes them."""
        if self.run.data.prompts:
            return [str(self.names.responses("records"))], ("label",)
        return list(self.run.data.pairs), ()

    def exports(self, training: Training) -> bool:
        """Whether it is exported: what a merge reads, and what no other training starts from."""
        name = name_of(training)
        if any(name in (*merge.models, self.base_of(merge)) for merge in self.run.merge):
            return True
        return name not in self.starts.values() if training.export is None else training.export


def sources_yaml(plan: Plan) -> dict[str, dict[str, Any]]:
    """What the sources.yaml of every training holds, by its name; prefixes are beside it."""
    found = {}
    for training in plan.run.train:
        name = name_of(training)
        top = plan.methods[name].soft_targets
        folder = f"../tokens/{plan.split_of(training)}" if top else "../logprobs"
        initial: Any = f"{folder}/{plan.starts[name]}"
        if plan.run.pivot.weight is not None:
            initial = {"logprobs": initial, "weight": plan.run.pivot.weight}
        entries = []
        for source in plan.sources_of(training):
            entry: dict[str, Any] = {"name": source.name, "logprobs": f"{folder}/{source.name}"}
            for field in ("domains", "weight", "accuracy"):
                if (value := getattr(source, field)) is not None:
                    entry[field] = value
            entries.append(entry)
        found[name] = {"initial": initial, "sources": entries}
    return found
