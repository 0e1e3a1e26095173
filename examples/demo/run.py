#!/usr/bin/env python
"""The main job, end to end, on two cores or a GPU: fuse two specialists into SmolLM2 by InfiFPO.

Every stage is a command that works the same at scale; finished stages are skipped on a rerun.

    make demo                                   # or, in an environment that has everything:
    python examples/demo/run.py --output runs/demo
"""

import argparse
import shutil
from pathlib import Path

import stages
import table
from job import Job

from megatron_infifpo.commands.entry import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to work in")
    parser.add_argument(
        "--gemma",
        action="store_true",
        help="add Gemma-3-270M as a source: needs its package, and accepting the Gemma terms",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    job = Job(args.output, stages.RECORDS)
    prepared = stages.prepare(job, gemma=args.gemma)

    job.stage(f"train by InfiFPO at PP {job.ranks}")
    sources = {
        split: job.sources(split, "pivot", prepared.models, stages.DOMAINS) for split in job.records
    }
    trained = job.train(
        "fused", "train", prepared.pivot,
        "--method", "infifpo", *stages.TRAIN, "--train-iters", "12",
        "--preference-sources", sources["train"],
        "--preference-valid-data", job.folder / "data" / "heldout",
        "--preference-valid-sources", sources["heldout"],
    )  # fmt: skip

    job.stage("export: Megatron -> Hugging Face, and score the held-out pairs with transformers")
    fused = job.export(trained)
    job.score("heldout", "fused", fused, "--backend", "transformers")
    job.score("heldout", "fused-megatron", trained, *job.pipeline)

    job.stage("held-out pairs before and after")
    table.check_export(job.folder / "logprobs")
    table.print_before_after(job.folder, sources["heldout"])

    job.stage("one page about the run")
    job.once("report", "report", trained)
    print(f"\ndone in {job.seconds():.0f} s: the fused model is in {fused}")


if __name__ == "__main__":
    run(main)
