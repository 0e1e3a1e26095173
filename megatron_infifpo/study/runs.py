"""One run of a method: its training, and what came of it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.study.inputs import Inputs, Run, method_of
from megatron_infifpo.study.settings import StudyMethod
from megatron_infifpo.study.stages import Stages, read_lines
from megatron_infifpo.study.statistics import slope
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
        row = {
            "condition": run.condition.name, "method": run.method.name, "settings": run.settings,
            "role": run.role, "variant": dict(run.variant), "set": run.of_set, "seed": run.seed,
        }  # fmt: skip
        row |= self.outcome(run, model)
        if why := self.why(run, model if explained else None):
            row["why"] = why
        for path in self.stages.folder.glob(f"{run.name}*"):
            if path.is_dir():
                shutil.rmtree(path)
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
        return self.train_on(run, start, run.name, self.inputs.flags(run))

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
            parts.append(self.train_on(run, start, f"{run.name}-{name}", targets))
        output = f"{run.name}-merged"
        words = ("merge", "--method", "sce", "--base", self.inputs.start(run), "--models", *parts)
        return self.stages.command(output, *words, "--output", self.stages.folder / output)

    # Outcomes.

    def outcome(self, run: Run, model: Path) -> dict[str, Any]:
        """What the model answers to held-out prompts, and how it has moved between two answers."""
        stages, questions = self.stages, self.stages.questions("heldout", 0)
        answers = self.stages.samples(
            f"{run.name}-greedy.jsonl", model, stages.prompts(0, 0, "heldout"),
            "--temperature", 0, "--count", 1, seed=0,
        )  # fmt: skip
        said = {row["id"]: row["responses"][0] for row in read_lines(answers) if row["responses"]}
        answers.unlink()
        right = np.array([said.get(q.id, "").strip() == q.right for q in questions])
        other = np.array([said.get(q.id, "").strip() == q.other for q in questions])
        domains = np.array([q.domain for q in questions])
        now, before = self.log_odds(run, f"{run.name}-odds", model), self.before(run)
        some = domains[: len(now)]
        row = {
            "accuracy": float(right.mean()),
            "domains": {domain: float(right[domains == domain].mean()) for domain in DOMAINS},
            "neither": float(1 - (right | other).mean()),
            "length": float(np.mean([len(said.get(q.id, "")) for q in questions])),
            "preference": float((now > 0).mean()),
            "log_odds": float(now.mean()),
        }
        surplus = self.surplus(run, before, some)
        known = ~np.isnan(surplus)
        if run.method.flags and known.any():
            row["slope"] = slope(surplus[known], (now - before)[known])
        return row

    def log_odds(self, run: Run, name: str, model: Path) -> np.ndarray:
        """Log-odds of the right against the other answer, of the first held-out questions."""
        return _log_odds(self.stages.scored(name, model, self.stages.heldout()))

    def before(self, run: Run) -> np.ndarray:
        """The same of the model that training starts from."""
        start = self.stages.tuned(run.condition, run.of_set, run.seed)
        place = f"{Stages.place(run.of_set, run.seed)}/{run.condition.pivot}"
        return self.log_odds(run, f"{place}-noise{run.condition.noise}/start-odds", start)

    def surplus(self, run: Run, before: np.ndarray, domains: np.ndarray) -> np.ndarray:
        """What the best source of each domain knows beyond the start, in log-odds."""
        names = run.condition.sources
        whole = Run(**{**vars(run), "method": StudyMethod(name="all", words="")})
        accuracy = self.inputs.accuracies(whole)
        found = np.full(len(before), np.nan)
        for domain in DOMAINS:
            able = [name for name in names if domain in accuracy[name]]
            if able:
                best = max(able, key=lambda name: accuracy[name][domain])
                model = self.stages.pretrained(best, run.of_set)
                odds = self.log_odds(run, f"models/{run.of_set}/{best}/odds", model)
                found[domains == domain] = (odds - before)[domains == domain]
        return found

    def why(self, run: Run, model: Path | None) -> dict[str, Any]:
        """What the method pushes at the start, and with a model also at the end."""
        file = self.stages.folder / f"{run.name}.yaml"
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
            policy = LogprobStore(self.stages.scored(f"{run.name}-own", model, records))
            found["end"] = explain(method, data, truth, policy)
        return found


def _log_odds(prefix: Path) -> np.ndarray:
    sums = LogprobStore(prefix).all_sums
    return np.asarray(sums[:, 0] - sums[:, 1])
