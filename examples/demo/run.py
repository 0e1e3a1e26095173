#!/usr/bin/env python
"""The main job, end to end, on two cores or a GPU: fuse two specialists into SmolLM2 by InfiFPO.

A quarter of the labels is wrong, and each specialist knows half of what is right. From one SFT
result the pivot is trained on the same pairs by InfiFPO and, beside it, by DPO and by more SFT.
Every stage is a command that works the same at scale; finished stages are skipped on a rerun.

    make demo                                   # or, in an environment that has everything:
    python examples/demo/run.py --output runs/demo
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import stages
import table
from job import Job

from megatron_infifpo.commands.entry import run

# name -> label, flags. DPO has InfiFPO's loss, too: only the reference is another.
METHODS = {
    "fused": ("InfiFPO", ["--method", "infifpo"]),
    "dpo": ("DPO", ["--method", "infifpo", "--reference", "initial"]),
    "more-sft": ("more SFT", ["--method", "sft"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to work in")
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    job, prepared, start = stages.prepare(args.output)
    sources = job.sources("preference", "sft", prepared.models)

    def second_stage(job: Job, name: str) -> None:
        flags = [*METHODS[name][1], *stages.TRAIN]
        if name != "more-sft":
            flags += ["--preference-sources", str(sources)]
        trained = job.train(name, "preference", start, *flags)
        job.score("heldout", name, trained)
        if name == "fused":
            job.score("heldout", "fused-hf", job.export(trained), "transformers")
            job.once("report", "report", trained)

    job.stage("second stage: InfiFPO, and beside it DPO and more SFT from the same start")
    job.side_by_side(
        *(partial(second_stage, name=name) for name in METHODS),
        partial(Job.score, split="heldout", name="pivot", model=prepared.pivot),
        *stages.scorings("heldout", start, prepared.models),
    )

    job.stage("held-out pairs")
    table.check_export(job.folder / "logprobs")
    labels = {f"{name}, a source": name for name in prepared.models}
    labels |= {"pivot": "pivot", "SFT, the start of all below": "sft"}
    labels |= {label: name for name, (label, _) in reversed(METHODS.items())}
    table.print_rows(job.folder, "heldout", labels)
    table.print_differences(job, "fused", {"DPO": "dpo", "more SFT": "more-sft", "SFT": "sft"})
    table.print_pull(job, sources)
    print(f"\na page about the run: {job.folder / 'fused' / 'report.html'}")
    print(f"done in {job.seconds():.0f} s: the fused model is in {job.folder / 'fused-hf'}")


if __name__ == "__main__":
    run(main)
