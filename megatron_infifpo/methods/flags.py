"""The command line of a method: `--method`, and a flag for every option of any."""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_infifpo.flag_types import flag
from megatron_infifpo.losses import LOSSES, MEANS_FACTOR, Loss
from megatron_infifpo.methods.method import METHODS, OWN, Method, shared_options
from megatron_infifpo.methods.resolving import resolve
from megatron_infifpo.options import described


def add_method_flags(parser: argparse.ArgumentParser, usual: str | None = None) -> None:
    """Add `--method` and a flag for each of its options.

    Args:
        parser: receives them.
        usual: what the help calls the default, where the command chooses it: `--method` is None
            then if it is not given.
    """
    group = parser.add_argument_group("method", "a preset, and options that override parts of it")
    group.add_argument(
        "--method",
        choices=list(METHODS),
        default=None if usual else "infifpo",
        help=f"preset (default: {usual or 'infifpo'})",
    )
    # The default is always None: what the method says.
    for name, option in OWN.items():
        text = f"{option.help} (default: {_usual(name)})"
        group.add_argument(flag(name), default=None, help=text, **option.parsing())
    for name, users in shared_options().items():
        option = next(iter(users.values()))
        text = described(option.help, users)
        group.add_argument(flag(name), default=None, help=text, **option.parsing())


def _usual(name: str) -> str:
    """What a field is in methods: one value, or the method's."""
    if name == "beta":
        usual = Loss.beta
        rest = ", ".join(
            f"{user} {loss.beta:g} and {loss.beta * MEANS_FACTOR:g}"
            for user, loss in LOSSES.items()
            if loss.beta != usual
        )
        return f"{usual:g} for sums and {usual * MEANS_FACTOR:g} for means; {rest}"
    if name == "verdict_scale":
        return f"1 for sums and {MEANS_FACTOR} for means"
    value, *others = {getattr(method, name) for method in METHODS.values()}
    return "the method's" if others else {False: "no", None: "none"}.get(value, value)


def method_from_options(name: str, options: Mapping[str, Any]) -> Method:
    """Resolve a method from what `add_method_flags` parsed, None where a flag was not given.

    Args:
        name: a key of `METHODS`.
        options: flags by name; those of others are left alone.

    Raises:
        UserError: as `resolve`.
    """
    ours = [option for option in (*OWN, *shared_options()) if options.get(option) is not None]
    return resolve(name, **{option: options[option] for option in ours})
