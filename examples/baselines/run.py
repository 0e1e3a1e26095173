#!/usr/bin/env python
"""FuseLLM, InfiFusion and FuseChat beside InfiFPO, on the demo's data and models.

The specialists and the SFT result are scored with the 16 most probable tokens at every token; these
are aligned and fused into soft targets, by domain as the table of `infifpo fuse-targets` says.
Every method then trains on as many records, with the same flags: the three on the chosen responses
and their targets, SFT on the chosen responses alone, InfiFPO on the pairs. FuseChat trains one
model with each source and merges them. Works in the demo's folder, and skips what is finished:
after `make demo`

    python examples/baselines/run.py                     # about 15 minutes on two cores
    python examples/baselines/run.py --only fusechat     # some rows; the table shows all finished
"""

import argparse
import sys
from pathlib import Path

from megatron_infifpo.commands.entry import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import stages  # noqa: E402
import table  # noqa: E402
from job import Job  # noqa: E402

TOP = ["--top-k", "16", "--top-k-responses", "chosen"]
# The records of the second stage, scored with the most probable tokens too.
SPLIT = "top"
LABELS = {
    "sft": "more SFT",
    "fusellm": "FuseLLM",
    "infifusion": "InfiFusion",
    "fusechat": "FuseChat",
    "infifpo": "InfiFPO",
}
# Flags of fuse-targets.
FUSE = {
    "fusellm": ["--include-initial"],
    "fusechat": ["--include-initial"],
    "infifusion": ["--fusion", "none"],
}


class Baselines:
    """Trains the demo's pivot by each method."""

    def __init__(self, job: Job, prepared: stages.Prepared, start: Path):
        """Take a job whose pairs are prepared and scored, and the SFT result."""
        self.job, self.prepared, self.start = job, prepared, start
        job.records[SPLIT] = job.records["preference"]
        self.names = list(prepared.models)

    def score(self) -> None:
        """Score the training records with the most probable tokens."""
        job = self.job
        job.stage("score the training records with the 16 most probable tokens")
        job.score(SPLIT, "sft", self.start, "pipeline", *TOP)
        for name, (model, layout) in self.prepared.models.items():
            job.score(SPLIT, name, model, layout, *TOP)

    def fuse(self, method: str, name: str, *flags: str) -> list[object]:
        """Fuse soft targets for a method; return the flag of training that names them."""
        job = self.job
        output = job.folder / "targets" / name
        job.once(
            f"targets-{name}", "fuse-targets", "--data", job.folder / "data" / "preference",
            "--sources", job.sources(SPLIT, "sft", self.names),
            "--output", output, *FUSE[method], *flags,
        )  # fmt: skip
        return ["--soft-targets", output]

    def train(self, method: str, name: str, *flags: object) -> Path:
        """Train the SFT result; return the run's folder."""
        flags = ("--method", method, *flags, *stages.TRAIN)
        return self.job.train(f"baselines-{name}", "preference", self.start, *flags)

    def model(self, method: str) -> Path:
        """Make a method's model; return its folder."""
        if method == "fusechat":
            return self.fusechat()
        self.job.stage(f"{LABELS[method]}: train, score the held-out pairs")
        if method in FUSE:
            return self.train(method, method, *self.fuse(method, method))
        if method == "sft":
            return self.train(method, method)
        sources = self.job.sources("preference", "sft", self.names)
        return self.train(method, method, "--preference-sources", sources)

    def fusechat(self) -> Path:
        """Train one model with each source, and merge them."""
        models = []
        for source in self.names:
            self.job.stage(f"FuseChat: train with {source}")
            name = f"fusechat-{source}"
            trained = self.train("fusechat", name, *self.fuse("fusechat", name, "--only", source))
            models.append(self.job.export(trained))
        self.job.stage("FuseChat: merge, score the held-out pairs")
        merged = self.job.folder / "baselines-fusechat"
        # As in FuseChat's code: a tenth of the changes alone is nearly the pivot again.
        how = ["--method", "sce", "--select", "weights", "--base", self.job.export(self.start)]
        self.job.once(merged.name, "merge", *how, "--models", *models, "--output", merged)
        return merged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument(
        "--only", nargs="+", choices=LABELS, default=list(LABELS), help="of the rows"
    )
    args = parser.parse_args()
    job, prepared, start = stages.prepare(args.output)
    baselines = Baselines(job, prepared, start)
    if set(args.only) & set(FUSE):
        baselines.score()
    for method in args.only:
        job.score("heldout", f"baselines-{method}", baselines.model(method))
    job.stage("held-out pairs")
    job.score("heldout", "sft", start)
    finished = {"SFT, the start": "sft"}
    for method, label in LABELS.items():
        if (job.folder / "logprobs" / f"heldout-baselines-{method}.json").exists():
            finished[label] = f"baselines-{method}"
    table.print_rows(job.folder, "heldout", finished)


if __name__ == "__main__":
    run(main)
