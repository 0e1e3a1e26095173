"""Command-line options of preference training, method presets, and their checks.

A method is a preset over orthogonal options; a flag overrides one option of the preset. An option
that would have no effect is an error, never ignored.
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_infifpo.cli import UserError


@dataclass(frozen=True)
class Method:
    """A fully resolved method.

    Attributes:
        objective: a key of `losses.LOSSES`.
        fused: the reference is the fused source model, else the initial pivot.
        length_normalization: log-probs are means over response tokens, else sums.
        beta: strength of the implied KL constraint.
        fusion, clip, margin_space, margin_anchor, selection: see `reference.fuse_reference`.
        initial_as_source: the initial pivot competes as one more source.
    """

    objective: str
    fused: bool
    length_normalization: bool
    beta: float
    fusion: str = "max-margin"
    clip: bool = True
    margin_space: str = "prob"
    margin_anchor: str = "current"
    selection: str = "response"
    initial_as_source: bool = False


METHODS: dict[str, Method] = {
    "dpo": Method("dpo", fused=False, length_normalization=False, beta=0.1),
    "infifpo": Method("dpo", fused=True, length_normalization=True, beta=2.5),
}

_SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


@dataclass
class PreferenceConfig:
    """Preference optimization against a fused reference (InfiFPO, arXiv 2505.13878)."""

    method: Literal["dpo", "infifpo"] = "infifpo"
    """What to train: InfiFPO, or DPO with the initial pivot as its reference."""

    preference_data: str | None = None
    """Prefix of the pivot's token dataset, written by tools/prepare_preferences.py."""

    preference_sources: str | None = None
    """sources.yaml: the log-prob datasets of the initial pivot and of the sources."""

    preference_valid_data: str | None = None
    """Prefix of a held-out token dataset: evaluated whole every --eval-interval steps."""

    preference_valid_sources: str | None = None
    """sources.yaml of the held-out pairs."""

    preference_epochs: int = 1
    """Passes over the pairs, in whole steps, where --train-iters is not given."""

    reference_check: Literal["error", "warn", "off"] = "error"
    """What to do when the initial pivot's log-probs are of other weights than a run starts from."""

    beta: float | None = None
    """Strength of the KL constraint (default: the method's, 2.5 for means and 0.1 for sums)."""

    length_normalization: bool | None = field(
        default=None,
        metadata={"argparse_meta": {"arg_names": ["--length-normalization"], **_SWITCH}},
    )
    """Use mean log-probs over response tokens instead of sums (default: the method's)."""

    fusion: Literal["max-margin", "average", "confidence"] | None = None
    """How the sources become one reference (default: max-margin)."""

    clip: bool | None = field(
        default=None, metadata={"argparse_meta": {"arg_names": ["--clip"], **_SWITCH}}
    )
    """Clip each source against the initial pivot before fusion (default: the method's)."""

    margin_space: Literal["prob", "log-prob"] | None = None
    """Compare max-margin's margins as probabilities or log-probs (default: prob)."""

    margin_anchor: Literal["current", "initial"] | None = None
    """Measure max-margin's margins to the current or to the initial pivot (default: current)."""

    selection: Literal["response", "pair"] | None = None
    """Let max-margin choose a source for each response or for the pair (default: response)."""

    initial_as_source: bool | None = field(
        default=None, metadata={"argparse_meta": {"arg_names": ["--initial-as-source"], **_SWITCH}}
    )
    """Let the initial pivot compete as one more source (default: no)."""


_FUSION_OPTIONS = (
    "fusion",
    "clip",
    "margin_space",
    "margin_anchor",
    "selection",
    "initial_as_source",
)
_MAX_MARGIN_OPTIONS = ("margin_space", "margin_anchor", "selection")


def flag(option: str) -> str:
    """Spelling of an option on the command line."""
    return "--" + option.replace("_", "-")


def resolve_method(args: argparse.Namespace) -> Method:
    """Apply the command line's overrides to the method's preset.

    Raises:
        UserError: beta is not positive, or an option has no effect for the method.
    """
    preset = METHODS[args.method]
    options = ("beta", "length_normalization", *_FUSION_OPTIONS)
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    if not preset.fused:
        for name in _FUSION_OPTIONS:
            if name in given:
                raise UserError(
                    f"{flag(name)} has no effect with --method {args.method}, whose reference is "
                    "the initial pivot: leave it out, or choose a fused method such as infifpo"
                )
    if "length_normalization" in given and "beta" not in given:
        if given["length_normalization"] != preset.length_normalization:
            given["beta"] = 2.5 if given["length_normalization"] else 0.1
    method = replace(preset, **given)
    if method.fused and method.fusion != "max-margin":
        for name in _MAX_MARGIN_OPTIONS:
            if name in given:
                raise UserError(
                    f"{flag(name)} has no effect with --fusion {method.fusion}: "
                    "it belongs to max-margin"
                )
    if method.beta <= 0:
        raise UserError(f"--beta is {method.beta}, expected a positive number")
    return method


# Megatron's features that change what a rank holds of a row or of the output layer's weight.
_UNSUPPORTED = {
    "context_parallel_size": "context parallelism would cut the packed pairs",
    "use_megatron_fsdp": "the log-prob head reads the whole shard of the output layer",
    "use_torch_fsdp2": "the log-prob head reads the whole shard of the output layer",
    "num_experts": "no converted model is a mixture of experts",
    "rampup_batch_size": "the step of a pair would depend on the ramp",
}


def refuse_unsupported(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse Megatron's features that packed preference pairs do not work with.

    Raises:
        UserError: names the flag and the reason.
    """
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name, None) != parser.get_default(name):
            raise UserError(f"{flag(name)} is not supported: {reason}; leave it out")


def override(
    args: argparse.Namespace, parser: argparse.ArgumentParser, values: dict[str, Any]
) -> None:
    """Set arguments that leave no choice.

    Raises:
        UserError: the command line gives another value, which would have no effect.
    """
    for name, value in values.items():
        given = getattr(args, name)
        if given != parser.get_default(name) and given != value:
            raise UserError(
                f"{flag(name)} is {given!r}, but only {value!r} works here: leave it out"
            )
        setattr(args, name, value)


def escape_help(parser: argparse.ArgumentParser) -> None:
    """Make `--help` work: some of Megatron's help texts hold a lone percent sign."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%") if action.help else None
