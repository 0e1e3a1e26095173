"""Make one HTML page about a training run: curves, sources, models, pairs, provenance.

    infifpo report runs/infifpo
    infifpo report runs/infifpo --trained logprobs/infifpo --output infifpo.html
    infifpo report runs/rounds

Reads run.json and the TensorBoard files of the --save folder, and the data that run.json names.
With --trained, log-probs of the same pairs under the trained pivot (infifpo score --model RUN_DIR),
the page also shows what training changed: selected sources, margins, pairs. Of lists it says which
models rank the responses as the judge does. Of the --output folder of infifpo rounds it shows what
changed from round to round.
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import fields_of, take_defaults
from megatron_infifpo.flag_types import positive
from megatron_infifpo.report.report import ReportJob, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, and what is not where the run says."""
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="--save folder of the run, or of rounds"
    )
    parser.add_argument("--output", type=Path, help="(default: RUN_DIR/report.html)")
    parser.add_argument("--tensorboard-dir", type=Path, help="(default: RUN_DIR/tensorboard)")
    parser.add_argument("--trained", metavar="PREFIX", help="log-probs of the trained pivot")
    parser.add_argument("--tokenizer", metavar="DIR", help="if it is no longer where it was")
    parser.add_argument("--shown", type=positive, help="pairs (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="of the tokenizer")
    take_defaults(parser, ReportJob)


def run(args: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    output = write_report(ReportJob(**fields_of(args, ReportJob)))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, nothing from a network")
