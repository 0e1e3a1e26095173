"""The table of Megatron's flags against Megatron's parser, as one rank."""

import argparse
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Megatron's parser with the program's flags, as a run makes it."""
    from megatron_infifpo.training.config import add_run_flags

    made = argparse.ArgumentParser("train")
    add_run_flags(made)
    return made


def on_gpu() -> None:
    """Let the checks of flags believe that there are GPUs, without any package for them."""
    from megatron_infifpo.megatron_flags import conditions
    from megatron_infifpo.patches import cpu

    cpu.is_enabled = lambda: False
    conditions.HAVE_TE = conditions.HAVE_NVML = False


def table() -> dict[str, Any]:
    """Every flag of Megatron's parser with its classes, and what the table names in vain."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_infifpo.megatron_flags.check import GROUPS
    from megatron_infifpo.megatron_flags.conditions import CHOICES, NEEDS

    made = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    classes: dict[str, tuple[str, list[str], Any]] = {}  # name -> group, options, class
    titles: set[str] = set()
    used: set[str] = set()
    for group in made._action_groups:
        if group._group_actions and group.title != "options":
            titles.add(group.title)
            for action in group._group_actions:
                known = GROUPS.get(group.title)
                found = None if known is None else known.classify(action.dest)
                options = classes.get(action.dest, ("", [], None))[1] + action.option_strings
                classes[action.dest] = group.title, options, found
    repeated, useless = [], []
    for title, group in GROUPS.items():
        keys = [key for key, *_ in group.named()]
        repeated += [key for key in keys if keys.count(key) > 1]
        mine = {name for name, (where, *_) in classes.items() if where == title}
        for key in keys:
            if key.endswith("*"):
                hits = {name for name in mine - set(keys) if name.startswith(key[:-1])}
                repeated += [name for name in hits & used]
            else:
                hits = {key} & mine
            used |= hits
            useless += [] if hits or group.optional else [f"{title}: {key}"]
    conditions = [name for need in NEEDS for name in need.names.split()]
    return {
        "classes": classes,
        "groups": (titles, {title for title, group in GROUPS.items() if not group.optional}),
        "repeated": repeated,
        "useless": useless,
        "conditions": [name for name in [*CHOICES, *conditions] if name not in classes],
    }


def another_value(action: argparse.Action) -> list[str] | None:
    """Words of a command line that give a flag a value other than its default."""
    if action.nargs == 0:
        return []
    candidates = ["7", "0.25", "x", "1,2", "[1]", "attn"]
    if action.choices is not None:
        candidates = [getattr(choice, "name", str(choice)) for choice in action.choices]
    for word in candidates:
        try:
            value = action.type(word) if callable(action.type) else word
        except (ValueError, TypeError, KeyError, AssertionError, argparse.ArgumentTypeError):
            continue
        if value != action.default:
            return [word] * action.nargs if isinstance(action.nargs, int) else [word]
    return None


def each_alone(gpu: bool) -> dict[str, tuple[str, list[str]]]:
    """Give every flag alone another value: option -> name and what the check says."""
    from megatron_infifpo.errors import UserError
    from megatron_infifpo.megatron_flags.check import flags, unsupported
    from megatron_infifpo.megatron_flags.conditions import CHOICES

    if gpu:
        on_gpu()
    made, found = parser(), {}
    for _, action in flags(made):
        words = another_value(action)
        if action.dest in CHOICES:
            allowed = CHOICES[action.dest][0].split()
            default = getattr(action.default, "name", action.default)
            words = [word for word in allowed if word != default][:1]
        if words or action.nargs == 0:
            option = action.option_strings[0]
            if isinstance(action, argparse.BooleanOptionalAction) and action.default:
                option = action.option_strings[-1]
            try:
                args = made.parse_args([option, *(words or [])])
            except UserError as error:
                found[option] = action.dest, [str(error)]
                continue
            if getattr(args, action.dest) != action.default:
                found[option] = action.dest, unsupported(vars(args), made)
    return found


def say(lines: list[list[str]], gpu: bool = False, packages: bool = False) -> list[list[str]]:
    """What the check says of each command line, on GPUs with or without packages for them."""
    from megatron_infifpo.megatron_flags import conditions
    from megatron_infifpo.megatron_flags.check import unsupported

    if gpu:
        on_gpu()
    if packages:
        conditions.HAVE_TE = conditions.HAVE_NVML = conditions.HAVE_FLASH = True
    made = parser()
    return [unsupported(vars(made.parse_args(argv)), made) for argv in lines]


def gpu_runs() -> list[list[str]]:
    """What the check says of the runs of tools/gpu_check.py, where all packages are installed."""
    from megatron_infifpo.megatron_flags.gpu_runs import GPU_RUNS

    given = ["--bf16", "--use-distributed-optimizer"]
    return say([[*given, *run.flags] for run in GPU_RUNS], gpu=True, packages=True)


def set_by_the_program() -> dict[str, set[str]]:
    """Names of arguments that the program sets, by where they come from."""
    from megatron_infifpo.engine.gpt import fixed_arguments
    from megatron_infifpo.engine.layer_kind import KINDS
    from megatron_infifpo.families import megatron_args
    from megatron_infifpo.families.architecture import _FREE
    from megatron_infifpo.patches import cpu
    from support import tiny

    architecture: set[str] = set()
    for name in tiny.FAMILIES:
        architecture |= set(megatron_args(tiny.config(name, vocab_size=320).to_dict()))
    by_kind = set().union(*(kind.arguments for kind in KINDS.values()))
    device = set(cpu.argument_overrides())
    fixed = set(fixed_arguments(KINDS["local"])) - by_kind - device
    parsed = vars(parser().parse_args([]))
    return {
        "checkpoint": (architecture - set(_FREE)) & set(parsed),
        "fixed": fixed,
        "kind": by_kind,
        "device": device,
    }


def page() -> str:
    """docs/megatron-flags.md, made anew."""
    from megatron_infifpo.megatron_flags import page

    return page.page()
