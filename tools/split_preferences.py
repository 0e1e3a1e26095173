#!/usr/bin/env python
"""Split preference records in two files, for SFT and for preference optimization after it.

    python tools/split_preferences.py --input all.jsonl --sft sft.jsonl --preference pairs.jsonl

Which file a record goes to depends on its prompt and the seed alone, so the split is the same in
every run, records of one prompt stay together, and adding records moves no other.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.flags import add_record_flags
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import iter_records
from megatron_infifpo.records.split import is_sft, to_json


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_record_flags(parser)
    parser.add_argument("--sft", required=True, type=Path, metavar="FILE", help=".jsonl to write")
    parser.add_argument(
        "--preference", required=True, type=Path, metavar="FILE", help=".jsonl to write"
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help="expected share of SFT prompts (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        raise UserError(f"--share is {args.share}, expected a number between 0 and 1")
    outputs = (args.preference, args.sft)
    if args.preference.resolve() == args.sft.resolve():
        raise UserError(f"--sft and --preference are both {args.sft}, expected two files")
    for path in outputs:
        if path.suffix != ".jsonl":
            raise UserError(f"{path} is to be written as JSON lines, expected a name in .jsonl")
        if path.exists():
            raise UserError(f"{path} exists: delete it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = [path.with_name(path.name + ".partial") for path in outputs]
    counts, report = [0, 0], ReadReport()
    records = iter_records(args.input, on_bad=args.on_bad_record, report=report)
    with contextlib.ExitStack() as stack:
        for path in partial:
            stack.callback(path.unlink, missing_ok=True)
        files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in partial]
        for record in tqdm(records, desc="split", unit=" records"):
            part = is_sft(record, share=args.share, seed=args.seed)
            files[part].write(json.dumps(to_json(record), ensure_ascii=False) + "\n")
            counts[part] += 1
        report.show()
        if not all(counts):
            raise UserError(
                f"one part of {' '.join(args.input)} is empty ({counts[1]} records for SFT, "
                f"{counts[0]} pairs); give more records or another --share or --seed"
            )
        for file in files:
            file.close()
        for source, target in zip(partial, outputs, strict=True):
            os.replace(source, target)
    print(f"{args.sft}: {counts[1]} records; {args.preference}: {counts[0]} records")


if __name__ == "__main__":
    run(main)
