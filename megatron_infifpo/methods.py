"""Methods: presets over orthogonal options, their command line, and their checks.

A flag overrides one option of the preset. An option that would have no effect is an error, never
ignored. Training, tools and examples all resolve a method here.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import LOSSES, loss_options
from megatron_infifpo.reference import FUSIONS, MARGIN_ANCHORS, MARGIN_SPACES, SELECTIONS


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        objective: a key of `losses.LOSSES`, or "sft": cross-entropy of the chosen responses.
        reference: "fused" source model or "initial" pivot; None for SFT.
        length_normalization: log-probs are means over response tokens, else sums.
        beta: strength of the implied KL constraint; 0 in a preset: `resolve` fills it in.
        fusion, clip, margin_space, margin_anchor, selection: see `reference.fuse_reference`.
        initial_as_source: the initial pivot competes as one more source.
        label_smoothing: share of labels taken to be wrong; None: the objective's default.
        alpha: WRPO's weight of the sources' best response, reached at the end of training.
        discopop_tau: DiscoPOP's temperature; None: the objective's default.
        sft_weight: weight of an SFT term on the chosen response, a mean over its tokens.
    """

    objective: str
    reference: str | None
    length_normalization: bool
    beta: float = 0.0
    fusion: str = "max-margin"
    clip: bool = True
    margin_space: str = "prob"
    margin_anchor: str = "current"
    selection: str = "response"
    initial_as_source: bool = False
    label_smoothing: float | None = None
    alpha: float | None = None
    discopop_tau: float | None = None
    sft_weight: float | None = None

    @property
    def fused(self) -> bool:
        """Whether the reference is the fused source model."""
        return self.reference == "fused"

    @property
    def responses(self) -> int:
        """How many of chosen, rejected, pivot_chosen the loss looks at."""
        return {"sft": 1, "wrpo": 3}.get(self.objective, 2)

    def loss_options(self, progress: float) -> dict[str, float]:
        """Arguments of the loss beside beta; alpha has grown in proportion to `progress`."""
        names = loss_options(self.objective)
        given = {name: getattr(self, name, None) for name in names}
        options = {name: value for name, value in given.items() if value is not None}
        if "alpha" in options:
            options["alpha"] *= progress
        return options


METHODS: dict[str, Method] = {
    "sft": Method("sft", None, length_normalization=True),
    "dpo": Method("dpo", "initial", length_normalization=False),
    "ipo": Method("ipo", "initial", length_normalization=True),
    "wrpo": Method("wrpo", "initial", length_normalization=False),
    "fpo": Method("dpo", "fused", length_normalization=False, clip=False),
    "infifpo": Method("dpo", "fused", length_normalization=True),
    "infifpo-ipo": Method("ipo", "fused", length_normalization=True),
    "infifpo-wrpo": Method("wrpo", "fused", length_normalization=True),
}

# Published beta for sums: 0.1; WRPO's is 0.01, and IPO's 0.1 is for means. A mean needs a beta
# larger by about the length of a response: InfiFPO has 2.5 for 0.1.
_SUMS_BETA = {"ipo": 0.004, "wrpo": 0.01}
_MEANS_FACTOR = 25
_WRPO_ALPHA = 0.1

_FUSION_OPTIONS = (
    "fusion",
    "clip",
    "margin_space",
    "margin_anchor",
    "selection",
    "initial_as_source",
)
_MAX_MARGIN_OPTIONS = ("margin_space", "margin_anchor", "selection")
_LOSS_OPTIONS = ("label_smoothing", "alpha", "discopop_tau")

_SWITCH = argparse.BooleanOptionalAction
# option -> how argparse reads it; the default is always None: what the method says.
_FLAGS: dict[str, dict[str, Any]] = {
    "objective": {
        "choices": list(LOSSES),
        "help": "preference loss (default: the method's)",
    },
    "reference": {
        "choices": ["initial", "fused"],
        "help": "the initial pivot, or the fused source model (default: the method's)",
    },
    "length_normalization": {
        "action": _SWITCH,
        "help": "mean log-probs over response tokens instead of sums (default: the method's)",
    },
    "beta": {
        "type": float,
        "help": "strength of the KL constraint (default: 0.1 for sums and 2.5 for means; "
        "ipo 0.004 and 0.1, wrpo 0.01 and 0.25)",
    },
    "fusion": {
        "choices": list(FUSIONS),
        "help": "how the sources become one reference (default: max-margin)",
    },
    "clip": {
        "action": _SWITCH,
        "help": "clip sources against the initial pivot before fusion (default: the method's)",
    },
    "margin_space": {
        "choices": MARGIN_SPACES,
        "help": "compare max-margin's margins as probabilities or log-probs (default: prob)",
    },
    "margin_anchor": {
        "choices": MARGIN_ANCHORS,
        "help": "measure margins to the current or to the initial pivot (default: current)",
    },
    "selection": {
        "choices": SELECTIONS,
        "help": "max-margin chooses a source for each response or for the pair (default: response)",
    },
    "initial_as_source": {
        "action": _SWITCH,
        "help": "the initial pivot competes as one more source (default: no)",
    },
    "label_smoothing": {
        "type": float,
        "help": "share of labels taken to be wrong, below 0.5, for dpo, wrpo, robust, exo_pair, "
        "aot and aot_unpaired (default: 0, exo_pair 0.001; robust needs a value)",
    },
    "alpha": {
        "type": float,
        "help": "WRPO's weight of the sources' best response; grows linearly from 0 to this over "
        "training (default: 0.1)",
    },
    "discopop_tau": {
        "type": float,
        "help": "discopop's temperature, above 0 and below 1 (default: 0.05)",
    },
    "sft_weight": {
        "type": float,
        "help": "add this times the cross-entropy of the chosen response, a mean over its tokens",
    },
}


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--method` and a flag for each of its options."""
    group = parser.add_argument_group("method", "a preset, and options that override parts of it")
    group.add_argument(
        "--method", choices=list(METHODS), default="infifpo", help="preset (default: infifpo)"
    )
    for option, how in _FLAGS.items():
        group.add_argument(flag(option), default=None, **how)


def flag(option: str) -> str:
    """Spelling of an option on the command line."""
    return "--" + option.replace("_", "-")


def method_from_args(args: argparse.Namespace) -> Method:
    """Resolve what `add_method_flags` parsed; errors as `resolve`."""
    given = {option: getattr(args, option) for option in _FLAGS}
    return resolve(args.method, **{name: v for name, v in given.items() if v is not None})


def resolve(name: str, **options: Any) -> Method:
    """Return a preset with some options changed and all defaults filled in.

    Args:
        name: a key of `METHODS`.
        options: fields of `Method`.

    Raises:
        UserError: an unknown method, an option that has no effect or is missing, or a value out of
            its range.
    """
    if name not in METHODS:
        raise UserError(f"the method is {name!r}, expected one of {', '.join(METHODS)}")
    for option, value in options.items():
        choices = _FLAGS[option].get("choices")
        if choices is not None and value not in choices:
            raise UserError(f"{flag(option)} is {value!r}, expected one of {', '.join(choices)}")
    method = replace(METHODS[name], **options)
    for option in options:
        if reason := _why_useless(name, method, option):
            raise UserError(f"{flag(option)} has no effect {reason}")
    if method.objective == "sft":
        return method
    for option, required in loss_options(method.objective).items():
        if required and getattr(method, option) is None and option != "alpha":
            raise UserError(
                f"--objective {method.objective} needs {flag(option)}, which it corrects for; "
                "without it, it is dpo"
            )
    if method.objective == "wrpo" and method.alpha is None:
        method = replace(method, alpha=_WRPO_ALPHA)
    if "beta" not in options:
        scale = _MEANS_FACTOR if method.length_normalization else 1
        method = replace(method, beta=_SUMS_BETA.get(method.objective, 0.1) * scale)
    _check_ranges(method)
    return method


def _why_useless(name: str, method: Method, option: str) -> str | None:
    """Say why an option has no effect, or None."""
    if METHODS[name].objective == "sft":
        return "with --method sft, which trains on the chosen responses alone: leave it out"
    if option in _FUSION_OPTIONS and not method.fused:
        by = "--reference initial" if METHODS[name].fused else f"--method {name}"
        return f"with {by}: the reference is the initial pivot, nothing is fused; leave it out"
    if option in _MAX_MARGIN_OPTIONS and method.fusion != "max-margin":
        return f"with --fusion {method.fusion}: it belongs to max-margin"
    from_initial = method.fusion == "max-margin" and method.margin_anchor == "initial"
    if option == "initial_as_source" and method.initial_as_source and from_initial:
        return "with --margin-anchor initial: the initial pivot's own margin is 0, it never wins"
    one_side = from_initial and method.clip and method.selection == "response"
    if option == "margin_space" and method.margin_space == "log-prob" and one_side:
        return (
            "with --margin-anchor initial and clipped sources: they lie on one side of the anchor, "
            "where log-probs rank as probabilities do"
        )
    if option in _LOSS_OPTIONS and option not in loss_options(method.objective):
        users = [loss for loss in LOSSES if option in loss_options(loss)]
        return f"with the objective {method.objective}: it belongs to {', '.join(users)}"
    return None


def _check_ranges(method: Method) -> None:
    """Refuse values for which the formulas make no sense."""
    smoothing_above_zero = method.objective in ("robust", "exo_pair")
    for option, low, high, includes_low, includes_high in (
        ("beta", 0.0, float("inf"), False, False),
        ("label_smoothing", 0.0, 0.5, not smoothing_above_zero, False),
        ("alpha", 0.0, 1.0, True, True),
        ("discopop_tau", 0.0, 1.0, False, False),
        ("sft_weight", 0.0, float("inf"), False, False),
    ):
        value = getattr(method, option)
        if value is None:
            continue
        above = value >= low if includes_low else value > low
        below = value <= high if includes_high else value < high
        if not (above and below):
            left, right = ("[" if includes_low else "("), ("]" if includes_high else ")")
            raise UserError(
                f"{flag(option)} is {value}, expected a number in {left}{low:g}, {high:g}{right}"
            )
