#!/usr/bin/env python
"""The paper's two stages: SFT on one half of the records, InfiFPO on the other half.

The split is by prompt and deterministic; no record is in both halves. SFT takes 3 epochs, InfiFPO 1
and starts from the SFT result, whose log-probs are therefore those of the initial pivot.

Everything runs on two ranks at PP 2 or TP 2, or on one GPU: docs/method.md has the commands for a
cluster.

    python examples/two_stage/run.py                     # the demo's pivot, sources and records
    python examples/two_stage/run.py --output runs/mine --pivot pivot-hf --records all.jsonl \\
        --heldout heldout.jsonl --source qwen=qwen-hf --source coder=coder-hf:code \\
        --sft-flags "--lr 1e-6 --global-batch-size 128 --micro-batch-size 2" \\
        --flags "--lr 1e-7 --global-batch-size 128 --micro-batch-size 2"
"""

import argparse
import sys
from pathlib import Path

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES
from megatron_infifpo.families.architecture import read_hf_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import stages  # noqa: E402
import table  # noqa: E402
from job import Job  # noqa: E402

STAGES = ("sft", "preference")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/two-stage"), help="folder")
    parser.add_argument("--pivot", type=Path, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--records", type=Path, default=stages.RECORDS["train"], metavar="FILE")
    parser.add_argument("--heldout", type=Path, default=stages.RECORDS["heldout"], metavar="FILE")
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME=DIR[:DOMAIN,...]",
        help="a source as a Hugging Face folder, and its domains if not all; once a source",
    )
    demo = " ".join(stages.TRAIN)
    parser.add_argument("--sft-flags", default=demo, help="Megatron's flags (default: the demo's)")
    parser.add_argument("--flags", default=demo, help="of InfiFPO (default: the demo's)")
    args = parser.parse_args()
    if (args.pivot is None) != (args.source is None):
        raise UserError("give --pivot and --source together, or neither for the demo's models")

    halves = {stage: args.output.resolve() / f"{stage}.jsonl" for stage in STAGES}
    job = Job(args.output, {**halves, "heldout": args.heldout.resolve()})
    if args.pivot is None:
        prepared, domains = stages.models(job, gemma=False), stages.DOMAINS
    else:
        models, domains = read_sources(args.source, job.tensor)
        pivot = job.import_pivot(args.pivot.resolve())
        prepared = stages.Prepared(args.pivot.resolve(), pivot, models)

    job.stage("split the records by prompt, tokenize both halves for the pivot")
    parts = [word for stage in STAGES for word in (f"--{stage}", halves[stage])]
    job.once("split", "split", "--input", args.records.resolve(), *parts)
    for split in job.records:
        job.tokenize(split, prepared.hf_pivot)

    job.stage("first stage: SFT on the chosen responses, 3 epochs")
    epochs = ["--preference-epochs", "3"]
    sft = job.train(
        "sft", "sft", prepared.pivot, "--method", "sft", *args.sft_flags.split(), *epochs
    )

    job.stage("score the other half: the SFT result is the initial pivot now")
    job.score("preference", "sft", sft, *job.pipeline)
    stages.score_sources(job, prepared, ("preference",))

    job.stage("second stage: InfiFPO from the SFT result, 1 epoch")
    sources = job.sources("preference", "sft", prepared.models, domains)
    flags = ["--method", "infifpo", *args.flags.split(), "--preference-sources", sources]
    fused = job.train("infifpo", "preference", sft, *flags)
    exported = job.export(fused)

    job.stage("held-out pairs")
    for name, model in (("pivot", prepared.pivot), ("sft", sft), ("infifpo", fused)):
        job.score("heldout", name, model, *job.pipeline)
    rows = {"pivot": "pivot", "after SFT": "sft", "after InfiFPO": "infifpo"}
    table.print_rows(job.folder, "heldout", rows)
    print(f"\ndone in {job.seconds():.0f} s: the fused model is in {exported}")


def read_sources(given: list[str], tensor: list[str]) -> tuple[dict, dict[str, list[str]]]:
    """Models with the flags that score them, and domains, from NAME=DIR[:DOMAIN,...]."""
    models, domains = {}, {}
    for text in given:
        name, _, rest = text.partition("=")
        folder, _, limits = rest.partition(":")
        if not name or not (Path(folder) / "config.json").exists():
            raise UserError(
                f"--source {text}: expected NAME=DIR[:DOMAIN,...], DIR with config.json"
            )
        if name in models or name in ("pivot", "sft", "infifpo"):
            raise UserError(f"--source {text}: the name {name} is taken, expected another")
        known = read_hf_config(folder).get("model_type") in FAMILIES
        models[name] = (Path(folder).resolve(), tensor if known else ["--backend", "transformers"])
        if limits:
            domains[name] = limits.split(",")
    return models, domains


if __name__ == "__main__":
    run(main)
