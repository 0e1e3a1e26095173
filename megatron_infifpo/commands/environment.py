"""Say what is installed here, and which path every part of a run would take.

    infifpo environment

Versions, devices, the driver, and what would compute layers, attention, the optimizer and
collectives, as a run on this machine would choose them. Send it with every report of a defect.
Where no run could start, because a driver is too old or Transformer Engine does not import, it says
why and exits with code 2.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no flags."""


def run(args: argparse.Namespace) -> None:
    """Print the report; where no run could start, the reason after it, and exit with code 2."""
    from megatron_infifpo.engine.environment import report
    from megatron_infifpo.errors import UserError
    from megatron_infifpo.patches import cpu

    try:
        cpu.enable()
    except UserError as error:
        print(report(error), flush=True)
        raise
    print(report())
