"""What a run is given: its start, its sources' log-probs or a control's, and the truth."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.methods import Method, add_method_flags, method_from_options
from megatron_infifpo.study import controls
from megatron_infifpo.study.models import KINDS
from megatron_infifpo.study.settings import BEST, TUNING, Condition, StudyMethod
from megatron_infifpo.study.stages import Stages, read_lines
from megatron_infifpo.study.world import DOMAINS, verdict

CONDITION = ("judge", "pivot", "sources", "on_policy")  # what matters of one
TOP_K = ("--top-k", 8, "--top-k-responses", "chosen")


@dataclass(frozen=True)
class Run:
    """A method in a condition, with settings and a seed."""

    condition: Condition
    method: StudyMethod
    settings: str  # matched or tuned
    role: str  # tuning or final
    variant: Mapping[str, float]
    of_set: int
    seed: int

    @property
    def exam(self) -> str:
        """The part of the prompts that tells how good the model is."""
        return "tuning" if self.role == TUNING else "heldout"

    @property
    def digest(self) -> str:
        """Of all that the settings say of it: a run of other settings is another one."""
        where = [vars(self.condition)[name] for name in CONDITION]
        what = {n: v for n, v in vars(self.method).items() if n not in ("words", "grid")}
        text = json.dumps([where, what, dict(self.variant)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def named(self) -> dict[str, Any]:
        """How its row of results begins."""
        return {
            "condition": self.condition.name, "method": self.method.name,
            "settings": self.settings, "role": self.role, "variant": dict(self.variant),
            "set": self.of_set, "seed": self.seed, "digest": self.digest,
        }  # fmt: skip

    @property
    def name(self) -> str:
        """Of its folder, which is its own."""
        said = "".join(f",{name}={value:g}" for name, value in self.variant.items())
        place = Stages.place(self.of_set, self.seed)
        return f"{place}/runs/{self.condition.name}/{self.method.name},{self.settings}{said}"


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a run from others, of what its row begins with."""
    names = ("condition", "method", "settings", "role", "set", "seed", "digest")
    return tuple(row[name] for name in names)


class Inputs:
    """Makes what a run is given, in a folder of stages."""

    def __init__(self, stages: Stages) -> None:
        """Take the stages."""
        self.stages = stages

    def start(self, run: Run) -> Path:
        """The model that training starts from, as a Hugging Face folder."""
        place = f"{Stages.place(run.of_set, run.seed)}/{run.condition.pivot}"
        name = f"{place}-{run.condition.judge}/sft-hf"
        return self.stages.exported(name, self.stages.tuned(run.condition, run.of_set, run.seed))

    def flags(self, run: Run) -> list[object]:
        """Flags of what the method learns from beside its data."""
        if run.method.targets is not None:
            return ["--soft-targets", self.soft_targets(run, self.sources(run))]
        method = method_of(run.method)
        if method.reference is None and method.pair_weights is None:
            return []
        return ["--preference-sources", self.sources_file(run)]

    def sources(self, run: Run) -> tuple[str, ...]:
        """Names of the method's sources."""
        if run.method.sources is None:
            return run.condition.sources
        if run.method.sources != (BEST,):
            return run.method.sources
        accuracy = self.accuracies(run, run.condition.sources)
        return (max(accuracy, key=lambda name: sum(accuracy[name].values())),)

    def home(self, run: Run) -> str:
        """Of the records."""
        return self.stages.home(run.condition, run.of_set, run.seed, run.method.data)

    def scored(self, run: Run, source: str, *, top_k: bool = False) -> Path:
        """A model's log-probs of the run's records."""
        stages, c = self.stages, run.condition
        records = stages.records(c, run.of_set, run.seed, run.method.data)
        name = f"{self.home(run)}-scores{'-top' if top_k else ''}/{source}"
        flags: list[object] = list(TOP_K) if top_k else []
        if source == "initial":
            return stages.scored(name, stages.tuned(c, run.of_set, run.seed), records, *flags)
        if KINDS[source].domains != DOMAINS:
            flags += ["--domains", *KINDS[source].domains]
        return stages.scored(name, stages.pretrained(source, run.of_set), records, *flags)

    def controlled(self, run: Run, source: str) -> Path:
        """The same, or what a control puts in its place."""
        control = run.method.control
        store = self.scored(run, source)
        if control is None:
            return store
        name = f"{self.home(run)}-{control}/{source}"
        records = read_lines(
            self.stages.records(run.condition, run.of_set, run.seed, run.method.data)
        )
        if control == "shuffled":
            domains = [record["domain"] for record in records]
            return self.stages.once(
                name, lambda path: controls.shuffled(store, path, domains, run.seed)
            )
        if control == "uniform":
            return self.stages.once(name, lambda path: controls.uniform(store, path))
        verdicts = self.truth(run)
        initial = self.scored(run, "initial")
        return self.stages.once(name, lambda path: controls.truth(initial, path, verdicts))

    def sources_file(self, run: Run) -> Path:
        """The run's sources.yaml."""
        accuracy = self.accuracies(run, self.sources(run))
        entries: list[dict[str, Any]] = [
            {
                "name": name,
                "logprobs": str(self.controlled(run, name)),
                "accuracy": accuracy[name],
                "domains": list(KINDS[name].domains),
            }
            for name in self.sources(run)
        ]
        if run.method.control == "truth":
            entries = [{"name": "truth", "logprobs": entries[0]["logprobs"], "accuracy": 1.0}]
        path = self.stages.folder / f"{run.name}/sources.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"initial": str(self.scored(run, "initial")), "sources": entries}
        path.write_text(json.dumps(content, indent=1))  # which is YAML, too
        return path

    def accuracies(self, run: Run, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Sources' accuracies by domain, as the condition's judge sees them on prompts apart."""
        found: dict[str, dict[str, float]] = {}
        for name in names:
            judged: dict[str, list[float]] = {domain: [] for domain in KINDS[name].domains}
            for row in self.verified(name, run.of_set):
                judged[row["domain"]].append(verdict(row, run.condition.judge))
            found[name] = {domain: float(np.mean(each)) for domain, each in judged.items()}
        return found

    def verified(self, model: str, of_set: int) -> list[dict[str, Any]]:
        """A source's greedy answers to prompts that are for this alone."""
        prompts = self.stages.prompts("parts", "verification")
        hf = self.stages.pretrained_hf(model, of_set)
        name = f"models/{of_set}/{model}/answers.jsonl"
        greedy = ("--temperature", 0, "--count", 1, "--domains", *KINDS[model].domains)
        return read_lines(self.stages.samples(name, hf, prompts, *greedy, seed=0))

    def soft_targets(self, run: Run, names: Sequence[str]) -> Path:
        """What the sources say of every token, fused."""
        c, kind = run.condition, "+".join(names)
        name = f"{self.home(run)}-targets/{run.method.name}-{kind}"
        path = self.stages.folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        stores = {each: str(self.scored(run, each, top_k=True)) for each in ("initial", *names)}
        entries = [{"name": each, "logprobs": stores[each]} for each in names]
        path.write_text(json.dumps({"initial": stores["initial"], "sources": entries}))
        data = self.stages.pairs(c, run.of_set, run.seed, run.method.data)
        words = ("fuse-targets", "--data", data, "--sources", path, *(run.method.targets or ()))
        return self.stages.command(name, *words, "--output", self.stages.folder / name)

    def truth(self, run: Run) -> np.ndarray:
        """Of every record: 1 where chosen alone is right, -1 where rejected alone is, else 0."""
        records = self.stages.records(run.condition, run.of_set, run.seed, run.method.data)
        answers = {q.id: q.right for q in self.stages.questions("preference", run.seed)}
        rows = read_lines(records)
        if run.method.data == "lists":
            width = max(len(row["responses"]) for row in rows)
            found = np.zeros((len(rows), width), int)
            for index, row in enumerate(rows):
                right = [_text(r) == answers[row["id"]] for r in row["responses"]]
                found[index, : len(right)] = np.where(right, 1, -1)
            return found
        good = [
            [_text(row[name]) == answers[row["id"]] for name in ("chosen", "rejected")]
            for row in rows
        ]
        return np.array([int(chosen) - int(rejected) for chosen, rejected in good])


def method_of(method: StudyMethod, variant: Mapping[str, float] | None = None) -> Method:
    """The method that a run's flags ask for."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_method_flags(parser)
    words = [*method.flags]
    for flag, value in (variant or {}).items():
        words += [f"--{flag}", str(value)]
    options, _ = parser.parse_known_args(words)
    return method_from_options(options.method, vars(options))


def _text(response: Any) -> str:
    """A response's text, of a string or of a message list."""
    if isinstance(response, str):
        return response.strip()
    return str(response[-1]["content"]).strip()
