#!/usr/bin/env python
"""The paper's two stages: SFT on one half of the records, InfiFPO on the other half.

The split is by prompt and deterministic; no record is in both halves. SFT takes 3 epochs, InfiFPO 1
and starts from the SFT result, whose log-probs are therefore those of the initial pivot.

`make demo` does so with models and records of its own, in examples/demo; this is for yours, on two
ranks at PP 2 or TP 2, or on one GPU. docs/method.md has the commands for a cluster.

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/two-stage"), help="folder")
    parser.add_argument("--pivot", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--records", type=Path, required=True, help="preference records")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out ones")
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="NAME=DIR[:DOMAIN,...]",
        help="a source as a Hugging Face folder, and its domains if not all; once a source",
    )
    demo = " ".join(stages.TRAIN)
    parser.add_argument("--sft-flags", default=demo, help="Megatron's flags (default: the demo's)")
    parser.add_argument("--flags", default=demo, help="of InfiFPO (default: the demo's)")
    args = parser.parse_args()

    job = stages.new_job(args.output, args.heldout.resolve())
    models, domains = read_sources(args.source)
    pivot = job.import_pivot(args.pivot.resolve())
    prepared = stages.Prepared(args.pivot.resolve(), pivot, models)
    stages.halve(job, args.records.resolve(), prepared.hf_pivot)
    flags = [*args.sft_flags.split(), "--preference-epochs", "3"]
    sft = stages.first_stage(job, prepared.pivot, *flags)

    job.stage("score the other half: the SFT result is the initial pivot now")
    job.side_by_side(*stages.scorings("preference", sft, prepared.models))

    job.stage("second stage: InfiFPO from the SFT result, 1 epoch")
    sources = job.sources("preference", "sft", prepared.models, domains)
    flags = ["--method", "infifpo", *args.flags.split(), "--preference-sources", sources]
    fused = job.train("infifpo", "preference", sft, *flags)
    exported = job.export(fused)

    job.stage("held-out pairs")
    for name, model in (("pivot", prepared.pivot), ("sft", sft), ("infifpo", fused)):
        job.score("heldout", name, model)
    rows = {"pivot": "pivot", "after SFT": "sft", "after InfiFPO": "infifpo"}
    table.print_rows(job.folder, "heldout", rows)
    print(f"\ndone in {job.seconds():.0f} s: the fused model is in {exported}")


def read_sources(given: list[str]) -> tuple[dict, dict[str, list[str]]]:
    """Models with the layout that scores them, and domains, from NAME=DIR[:DOMAIN,...]."""
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
        models[name] = (Path(folder).resolve(), "tensor" if known else "transformers")
        if limits:
            domains[name] = limits.split(",")
    return models, domains


if __name__ == "__main__":
    run(main)
