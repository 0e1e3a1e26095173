"""Compare methods in a small world, with controls, seeds and intervals: does fusing help, and when?

    infifpo study run --settings examples/study/study.yaml --output runs/study
    infifpo study report --settings examples/study/study.yaml \\
        --results runs/study/results.jsonl --output runs/study/report

Small models of real families are trained from nothing, sampled from, judged, scored and trained by
every method, all through this program's commands. Finished runs are lines of OUTPUT/results.jsonl:
give an interrupted command again. `report` writes tables and figures of such a file.
"""

import argparse
import os
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two things that can be done."""
    parser.add_argument("what", choices=("run", "report"), help="do the runs, or write about them")
    parser.add_argument(
        "--settings", type=Path, required=True, metavar="FILE", help="YAML: what is compared, where"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="of the runs, or of the report"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="of report: .jsonl, or .jsonl.gz"
    )
    parser.add_argument(
        "--conditions", nargs="+", metavar="NAME", default=[], help="of run: some (default: all)"
    )
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), metavar="N",
        help="of run: runs at once, a core each (default: all cores)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run or report; 1 where runs have failed."""
    from megatron_infifpo.study.settings import Settings

    settings = Settings.read(args.settings)
    if args.what == "report":
        from megatron_infifpo.study.report import write_report

        if args.results is None:
            raise UserError("--results is missing: the file of finished runs")
        print(write_report(args.results, settings.told, args.output))
        return 0
    if unknown := set(args.conditions) - set(settings.conditions):
        known = ", ".join(settings.conditions)
        raise UserError(f"--conditions has {', '.join(sorted(unknown))}, expected some of {known}")
    from megatron_infifpo.commands.main import main
    from megatron_infifpo.study.study import Study

    study = Study(args.output, settings, main, args.conditions)
    failed = study.work(args.workers)
    print(f"{len(study.rows())} runs in {study.results}; failed: {len(failed)}")
    return int(bool(failed))
