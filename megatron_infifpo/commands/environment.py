"""Say what is installed here, and which path every part of a run would take.

    infifpo environment

Versions, devices, the driver, and what would compute layers, attention, the optimizer and
collectives, as a run on this machine would choose them. Send it with every report of a defect.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no flags."""


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    from megatron_infifpo.patches import cpu

    cpu.enable()
    from megatron_infifpo.engine.environment import report

    print(report())
