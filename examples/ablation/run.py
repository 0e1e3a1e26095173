#!/usr/bin/env python
"""The paper's ablations on the demo's data: nothing but flags (and listed sources) differ.

Length normalisation and clipping, on and off; the three fusions; 1 to M sources; and DPO, which has
no source at all. Works in the demo's folder, and skips what is finished: after `make demo`

    python examples/ablation/run.py                      # about ten minutes on two cores
    python examples/ablation/run.py --only average       # some rows; the table shows all finished
"""

import argparse
import sys
from pathlib import Path

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import stages  # noqa: E402
import table  # noqa: E402

SUMS = ["--no-length-normalization"]
# name -> label of the row, flags
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "infifpo": ("InfiFPO", []),
    "sums": ("  without length normalisation", SUMS),
    "unclipped": ("  without clipping", ["--no-clip"]),
    "neither": ("  without both", [*SUMS, "--no-clip"]),
    "average": ("  average fusion", ["--fusion", "average"]),
    "confidence": ("  confidence fusion", ["--fusion", "confidence"]),
    "dpo": ("no source: DPO", ["--reference", "initial"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ROW",
        help=f"train these only: {', '.join(VARIANTS)}, sources-1, sources-2, ...",
    )
    args = parser.parse_args()
    job, prepared, start = stages.prepare(args.output)
    names = list(prepared.models)
    # name -> label, flags, sources
    rows = {name: (label, flags, names) for name, (label, flags) in VARIANTS.items()}
    for count in range(1, len(names)):
        label = f"  {count} of {len(names)} sources: {', '.join(names[:count])}"
        rows[f"sources-{count}"] = (label, [], names[:count])
    chosen = args.only or list(rows)
    if unknown := set(chosen) - set(rows):
        raise UserError(f"--only has {', '.join(sorted(unknown))}, expected {', '.join(rows)}")
    for name in chosen:
        label, flags, sources = rows[name]
        job.stage(f"{label.strip()}: train, score the held-out pairs")
        trained = job.train(
            f"ablation-{name}", "preference", start, "--method", "infifpo", *flags, *stages.TRAIN,
            "--preference-sources", job.sources("preference", "sft", sources),
        )  # fmt: skip
        job.score("heldout", f"ablation-{name}", trained)
    job.stage("held-out pairs")
    job.score("heldout", "sft", start)
    finished = {"SFT, the start": "sft"}
    for name, (label, _, _) in rows.items():
        if (job.folder / "logprobs" / f"heldout-ablation-{name}.json").exists():
            finished[label] = f"ablation-{name}"
    table.print_rows(job.folder, "heldout", finished)


if __name__ == "__main__":
    run(main)
