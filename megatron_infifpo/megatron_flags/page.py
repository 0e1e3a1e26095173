"""Write docs/megatron-flags.md from the table: python -m megatron_infifpo.megatron_flags.page."""

import argparse
import textwrap
from collections.abc import Iterable

from megatron_infifpo.patches import cpu

cpu.enable(announce=False)

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from megatron_infifpo.megatron_flags.check import GROUPS  # noqa: E402
from megatron_infifpo.megatron_flags.conditions import CHOICES, CONFLICTS  # noqa: E402
from megatron_infifpo.megatron_flags.group import (  # noqa: E402
    CHECKPOINT,
    DEVICE,
    FIXED,
    GPU,
    REFUSED,
    WORKS,
)

_HEADER = """\
# Megatron's flags

Every flag of Megatron's parser works, or is refused in a sentence before anything starts. This page
is made from the table that the program acts on, `megatron_infifpo/megatron_flags`, by
`python -m megatron_infifpo.megatron_flags.page`.

## What works

On any device:
"""
_NOTES = """
`--log-throughput` counts what full rows of `--seq-length` would cost: its TFLOP/s are not those of
packed rows. `--apply-wd-to-qk-layernorm` changes only models that normalise queries and keys.
`--log-validation-ppl-to-tensorboard` takes the loss for a cross-entropy, which it is in SFT.

On GPUs only, and refused on a CPU:
"""
_SET = {
    FIXED: "By the program, which refuses another value: ",
    DEVICE: "By the program on a CPU; refused on GPUs, where they change nothing: ",
    CHECKPOINT: "From the checkpoint, which a flag may repeat but not contradict: ",
}
_REFUSED = """\
## What is refused

`*` stands for any end of a name, with or without `--no-` or `--disable-` before it.

| flags | why |
|---|---|"""
_TOGETHER = """
## What must go together

A flag that has no effect without another, like `--sgd-momentum` without `--optimizer sgd`, is
refused where that one is missing; the message names it. And:
"""


def parser() -> argparse.ArgumentParser:
    """Megatron's parser, without flags of ours."""
    made: argparse.ArgumentParser = add_megatron_arguments(
        argparse.ArgumentParser(allow_abbrev=False)
    )
    return made


def page() -> str:
    """Return the page, in Markdown."""
    actions = parser()._actions
    options = {action.dest: action.option_strings[0] for action in reversed(actions)}
    classes: dict[str, dict[str, list[str]]] = {}  # class -> group -> options
    reasons: dict[str, list[str]] = {}  # reason of a refusal -> groups and options
    for title, group in GROUPS.items():
        if group.optional:
            continue
        if group.rest is not None:
            all_of = f"all others of “{title}”" if group.named() else f"all of “{title}”"
            reasons.setdefault(group.rest, []).append(all_of)
        for name, kind, why in group.named():
            option = options.get(name, "--" + name.replace("_", "-"))
            if kind == REFUSED:
                reasons.setdefault(why, []).append(f"`{option}`")
            else:
                classes.setdefault(kind, {}).setdefault(title, []).append(option)
    parts = [_HEADER, _table(classes[WORKS]), _NOTES, _table(classes[GPU]), "\n## What is set\n"]
    for kind, introduction in _SET.items():
        found = [option for group in classes[kind].values() for option in group]
        parts.append(_wrap(f"{introduction}{_code(found)}.") + "\n")
    parts.append(_REFUSED)
    parts += [f"| {' '.join(flags)} | {why} |" for why, flags in reasons.items()]
    parts.append(_TOGETHER)
    for name, (allowed, why) in CHOICES.items():
        parts.append(f"- `{options[name]}` takes {_code(allowed.split())} only: {why}.")
    parts += [f"- {conflict.message}." for conflict in CONFLICTS]
    return "\n".join(parts) + "\n"


def _table(groups: dict[str, list[str]]) -> str:
    rows = [f"| {title} | {_code(options)} |" for title, options in groups.items()]
    return "\n".join(["| group of `--help` | flags |", "|---|---|", *rows])


def _code(options: Iterable[str]) -> str:
    return " ".join(f"`{option}`" for option in options)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
