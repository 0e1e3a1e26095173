#!/usr/bin/env python
"""The main job, end to end, on two cores or a GPU: fuse two specialists into SmolLM2 by InfiFPO.

A quarter of the labels is wrong, and each specialist knows half of what is right. This makes what
the run reads, its pivot, sources and records, in runs/demo/inputs. All else is one command on one
file, examples/demo/run.yaml, that works the same at scale: given again it goes on where it was.

    make demo                       # or, in an environment that has everything:
    python examples/demo/run.py
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import table
from island import write_records
from pivot import save_pivot
from specialists import train_all

from megatron_infifpo.commands.entry import run

OUTPUT = Path("runs/demo")  # as the file has it
FILE = Path(__file__).with_name("run.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help=f"delete {OUTPUT} first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(OUTPUT, ignore_errors=True)
    started = time.monotonic()
    make_inputs(OUTPUT / "inputs")
    words = ["-m", "megatron_infifpo", "fuse", str(FILE)]
    print(f"$ infifpo fuse {FILE}", flush=True)
    if code := subprocess.run([sys.executable, "-W", "ignore", *words]).returncode:
        return code
    table.print_differences(OUTPUT, "fused", {"DPO": "dpo", "more SFT": "more-sft", "SFT": "sft"})
    table.print_pull(OUTPUT)
    print(f"\na page about the run: {OUTPUT / 'fused' / 'report.html'}")
    took = time.monotonic() - started
    print(f"done in {took:.0f} s: the fused model is in {OUTPUT / 'fused-hf'}")
    return 0


def make_inputs(folder: Path) -> None:
    """Write records, get the pivot, SmolLM2-135M-Instruct, and train its sources."""
    write_records(folder)
    save_pivot(folder / "pivot")
    train_all(folder / "sources")


if __name__ == "__main__":
    run(main)
