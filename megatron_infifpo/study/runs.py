"""One run of a method: its training, and what came of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.study import world
from megatron_infifpo.study.inputs import Inputs, Run, method_of
from megatron_infifpo.study.stages import Stages, read_lines
from megatron_infifpo.study.why import explain
from megatron_infifpo.study.world import DOMAINS


class Runner:
    """Makes runs in a folder of stages."""

    def __init__(self, stages: Stages) -> None:
        """Take the stages."""
        self.stages, self.inputs = stages, Inputs(stages)

    def __call__(self, run: Run, *, explained: bool) -> dict[str, Any]:
        """Train and evaluate; return the row of results."""
        started = time.monotonic()
        model = self.train(run)
        row = run.named | self.outcome(run, model)
        if why := self.why(run, model if explained else None):
            row["why"] = why
        return row | {"seconds": round(time.monotonic() - started, 1)}

    # Training.

    def train(self, run: Run) -> Path:
        """The trained model, as a Hugging Face folder."""
        stages, method = self.stages, run.method
        start = stages.tuned(run.condition, run.of_set, run.seed)
        if not method.flags:
            return self.inputs.start(run)
        if method.merged:
            return self.merged(run)
        return self.train_on(run, start, f"{run.name}/run", self.inputs.flags(run))

    def train_on(self, run: Run, start: Path, name: str, inputs: Sequence[object]) -> Path:
        """Train and export."""
        how = self.stages.settings.training
        flags: list[object] = [
            "--preference-epochs", how["epochs"], "--global-batch-size", how["batch"],
            "--micro-batch-size", how["batch"], "--lr", how["lr"], *run.method.flags,
        ]  # fmt: skip
        for flag, value in run.variant.items():
            flags += [f"--{flag}", value]
        c = run.condition
        data = self.stages.pairs(c, run.of_set, run.seed, run.method.data)
        trained = self.stages.train(name, start, data, *flags, *inputs, "--seed", run.seed + 1)
        return self.stages.exported(f"{name}-hf", trained)

    def merged(self, run: Run) -> Path:
        """Train with each source's targets, and merge (FuseChat)."""
        start = self.stages.tuned(run.condition, run.of_set, run.seed)
        parts = []
        for name in self.inputs.sources(run):
            targets = ["--soft-targets", self.inputs.soft_targets(run, [name])]
            parts.append(self.train_on(run, start, f"{run.name}/{name}", targets))
        output = f"{run.name}/merged"
        words = ("merge", "--method", "sce", "--base", self.inputs.start(run), "--models", *parts)
        return self.stages.command(output, *words, "--output", self.stages.folder / output)

    # Outcomes.

    def outcome(self, run: Run, model: Path) -> dict[str, Any]:
        """What the model answers to held-out prompts, and how it has moved between two answers."""
        stages, questions = self.stages, self.stages.questions(run.exam, 0)
        answers = stages.samples(
            f"{run.name}/greedy.jsonl", model, stages.prompts("parts", run.exam),
            "--temperature", 0, "--count", 1, seed=0,
        )  # fmt: skip
        said = {row["id"]: row["responses"][0] for row in read_lines(answers) if row["responses"]}
        right = np.array([said.get(q.id, "").strip() == q.right for q in questions])
        other = np.array([said.get(q.id, "").strip() == q.other for q in questions])
        domains = np.array([q.domain for q in questions])
        misjudged = np.array([world.misjudged(q.village) for q in questions])
        now, before = self.log_odds(run, f"{run.name}/odds", model), self.before(run)
        row = {
            "accuracy": float(right.mean()),
            "domains": {domain: float(right[domains == domain].mean()) for domain in DOMAINS},
            "accuracy_misjudged": float(right[misjudged].mean()),
            "neither": float(1 - (right | other).mean()),
            "length": float(np.mean([len(said.get(q.id, "")) for q in questions])),
            "preference": float((now > 0).mean()),
            "log_odds": float(now.mean()),
        }
        if run.method.flags:
            best = self.best_odds(run, domains[: len(now)])
            known = ~np.isnan(best)
            row["slope"] = transfer(now[known], before[known], best[known])
        return row

    def log_odds(self, run: Run, name: str, model: Path) -> np.ndarray:
        """Log-odds of the right against the other answer, of the first questions of the exam."""
        sums = LogprobStore(self.stages.scored(name, model, self.stages.answers(run.exam))).all_sums
        return np.asarray(sums[:, 0] - sums[:, 1])

    def before(self, run: Run) -> np.ndarray:
        """The same of the model that training starts from."""
        start = self.stages.tuned(run.condition, run.of_set, run.seed)
        place = f"{Stages.place(run.of_set, run.seed)}/{run.condition.pivot}"
        return self.log_odds(run, f"{place}-{run.condition.judge}/start-odds", start)

    def best_odds(self, run: Run, domains: np.ndarray) -> np.ndarray:
        """The same of the condition's best source in each question's domain; NaN without one."""
        accuracy = self.inputs.accuracies(run, run.condition.sources)
        found = np.full(len(domains), np.nan)
        for domain in DOMAINS:
            able = [name for name in accuracy if domain in accuracy[name]]
            if able:
                best = max(able, key=lambda name: accuracy[name][domain])
                model = self.stages.pretrained(best, run.of_set)
                odds = self.log_odds(run, f"models/{run.of_set}/{best}/{run.exam}-odds", model)
                found[domains == domain] = odds[domains == domain]
        return found

    def why(self, run: Run, model: Path | None) -> dict[str, Any]:
        """What the method pushes at the start, and with a model also at the end."""
        file = self.stages.folder / f"{run.name}/sources.yaml"
        if not run.method.flags or run.method.targets is not None or not file.exists():
            return {}
        method = method_of(run.method, run.variant)
        prefix = self.stages.pairs(run.condition, run.of_set, run.seed, run.method.data)
        data = PreferenceDataset.for_method(method, prefix, read_sources(file))
        truth = self.inputs.truth(run)
        found = {"start": explain(method, data, truth)}
        if model is not None:
            c = run.condition
            records = self.stages.records(c, run.of_set, run.seed, run.method.data)
            policy = LogprobStore(self.stages.scored(f"{run.name}/own", model, records))
            found["end"] = explain(method, data, truth, policy)
        return found


def transfer(now: np.ndarray, before: np.ndarray, source: np.ndarray) -> float:
    """How much of what a source knows a model has taken over.

    The coefficient of the source's log-odds in a least-squares fit of the change, `now - before`,
    to these and to `before`: without the latter, all that moves towards a common value would seem
    to have learnt from a source that it never saw.
    """
    columns = np.stack([source, before, np.ones_like(before)], axis=1)
    return float(np.linalg.lstsq(columns, now - before, rcond=None)[0][0])
