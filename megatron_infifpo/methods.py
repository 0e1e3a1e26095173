"""Methods: presets over orthogonal options, their command line, and their checks.

A flag overrides one option of the preset. Losses and fusions declare the options that are theirs.
An option that would have no effect is an error, never ignored. Training, tools and examples all
resolve a method here.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import flag
from megatron_infifpo.losses import BETA, LOSSES, MEANS_FACTOR, Loss
from megatron_infifpo.options import Option, described
from megatron_infifpo.reference import DEFAULT_FUSION, FUSIONS


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        objective: a key of `losses.LOSSES`, or "sft": cross-entropy of the chosen responses.
        reference: "fused" source model or "initial" pivot; None for SFT.
        length_normalization: log-probs are means over response tokens, else sums.
        beta: strength of the implied KL constraint; 0 in a preset: `resolve` fills it in.
        fusion, clip: see `reference.fuse_reference`.
        initial_as_source: the initial pivot competes as one more source.
        sft_weight: weight of an SFT term on the chosen response, a mean over its tokens.
        options: of the loss and the fusion, by name; what is not here has its default.
    """

    objective: str
    reference: str | None
    length_normalization: bool
    beta: float = 0.0
    fusion: str = DEFAULT_FUSION
    clip: bool = True
    initial_as_source: bool = False
    sft_weight: float | None = None
    options: Mapping[str, Any] = field(default=MappingProxyType({}), hash=False)

    @property
    def fused(self) -> bool:
        """Whether the reference is the fused source model."""
        return self.reference == "fused"

    @property
    def loss(self) -> Loss | None:
        """The preference loss; None for SFT."""
        return LOSSES.get(self.objective)

    @property
    def responses(self) -> int:
        """How many of chosen, rejected, pivot_chosen the loss looks at."""
        return 1 if self.loss is None else self.loss.responses

    @property
    def reads(self) -> tuple[str, ...]:
        """Values of a row that the loss takes beside log-probs."""
        return () if self.loss is None else self.loss.reads

    @property
    def several_pairs(self) -> bool:
        """Whether the loss depends on which pairs share a row."""
        return self.loss is not None and self.loss.several_pairs

    @property
    def _declared(self) -> Mapping[str, Option]:
        """Options of the loss."""
        return {} if self.loss is None else self.loss.options

    @property
    def growing(self) -> tuple[str, ...]:
        """Options of the loss that grow over training, so its length matters."""
        return tuple(name for name, option in self._declared.items() if option.grows)

    def loss_options(self, progress: float) -> dict[str, Any]:
        """Arguments of the loss beside beta, when a share `progress` of the training is done."""
        return {
            name: option.at(self.options[name], progress)
            for name, option in self._declared.items()
            if name in self.options
        }

    @property
    def fusion_options(self) -> dict[str, Any]:
        """Arguments of the fusion."""
        known = FUSIONS[self.fusion].options
        return {name: self.options.get(name, option.default) for name, option in known.items()}

    def describe(self) -> dict[str, Any]:
        """Return fields and options as one flat mapping, as run.json keeps them.

        Options that are not given have their default if they are a fusion's, None if a loss's.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        rest = {n: option.default for f in FUSIONS.values() for n, option in f.options.items()}
        rest |= dict.fromkeys(name for loss in LOSSES.values() for name in loss.options)
        return own | rest | dict(self.options)

    @classmethod
    def from_description(cls, found: Mapping[str, Any]) -> "Method":
        """Return the method that `describe` described.

        Raises:
            TypeError: it has a field or an option that this version does not have.
        """
        options = {n: v for n, v in found.items() if n in _shared_options() and v is not None}
        own = {name: value for name, value in found.items() if name not in _shared_options()}
        return cls(**own, options=MappingProxyType(options))


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

# The fields of `Method` that have a flag; loss and fusion declare the others.
_OWN = {
    "objective": Option("preference loss", choices=LOSSES),
    "reference": Option(
        "the initial pivot, or the fused source model", choices=("initial", "fused")
    ),
    "length_normalization": Option("mean log-probs over response tokens instead of sums"),
    "beta": BETA,
    "fusion": Option("how the sources become one reference", choices=FUSIONS),
    "clip": Option("clip sources against the initial pivot before fusion"),
    "initial_as_source": Option("the initial pivot competes as one more source"),
    "sft_weight": Option(
        "add this times the cross-entropy of the chosen response, a mean over its tokens",
        range="(0, inf)",
    ),
}


def _shared_options() -> dict[str, dict[str, Option]]:
    """Options of fusions and losses: by name, then by who takes them."""
    takes = [(user, fusion.options) for user, fusion in FUSIONS.items()]
    takes += [(user, loss.options) for user, loss in LOSSES.items()]
    found: dict[str, dict[str, Option]] = {}
    for user, options in takes:
        for name, option in options.items():
            found.setdefault(name, {})[user] = option
    return found


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--method` and a flag for each of its options."""
    group = parser.add_argument_group("method", "a preset, and options that override parts of it")
    group.add_argument(
        "--method", choices=list(METHODS), default="infifpo", help="preset (default: %(default)s)"
    )
    # The default is always None: what the method says.
    for name, option in _OWN.items():
        text = f"{option.help} (default: {_usual(name)})"
        group.add_argument(flag(name), default=None, help=text, **option.parsing())
    for name, users in _shared_options().items():
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
    ours = [option for option in (*_OWN, *_shared_options()) if options.get(option) is not None]
    return resolve(name, **{option: options[option] for option in ours})


def resolve(name: str, **options: Any) -> Method:
    """Return a preset with some options changed and all defaults filled in.

    Args:
        name: a key of `METHODS`.
        options: fields of `Method`, and options of losses and fusions.

    Raises:
        UserError: an unknown method or option, an option that has no effect or is missing, or a
            value out of its range.
    """
    if name not in METHODS:
        raise UserError(f"the method is {name!r}, expected one of {', '.join(METHODS)}")
    preset, shared = METHODS[name], _shared_options()
    for option, value in options.items():
        if option in _OWN:
            _check(option, _OWN[option], value)
        elif option not in shared:
            known = ", ".join((*_OWN, *shared))
            raise UserError(f"{option!r} is no option of a method, expected one of {known}")
    own = {option: value for option, value in options.items() if option in _OWN}
    given = {option: value for option, value in options.items() if option in shared}
    method = replace(preset, **own, options=MappingProxyType({**preset.options, **given}))
    for option in options:
        if reason := _why_useless(name, method, option):
            raise UserError(f"{flag(option)} has no effect {reason}")
    loss = method.loss
    if loss is None:
        return method
    if "beta" not in options:
        scale = MEANS_FACTOR if method.length_normalization else 1
        method = replace(method, beta=loss.beta * scale)
    return replace(method, options=MappingProxyType(_completed(method, loss)))


def _completed(method: Method, loss: Loss) -> dict[str, Any]:
    """Return the options, with what is needed and was not given, all in their ranges."""
    found = dict(method.options)
    users = [(f"--objective {method.objective}", loss.options)]
    if method.fused:
        users.append((f"--fusion {method.fusion}", FUSIONS[method.fusion].options))
    for user, options in users:
        for name, option in options.items():
            if option.required and name not in found:
                if option.default is None:
                    why = f", {option.why}" if option.why else ""
                    raise UserError(f"{user} needs {flag(name)}{why}")
                found[name] = option.default
            if name in found:
                _check(name, option, found[name])
    return found


def _check(name: str, option: Option, value: Any) -> None:
    """Refuse a value that an option cannot have."""
    if expected := option.expected(value):
        raise UserError(f"{flag(name)} is {value!r}, expected {expected}")


def _why_useless(name: str, method: Method, option: str) -> str | None:
    """Say why an option has no effect, or None."""
    if method.loss is None or METHODS[name].loss is None:
        return "with --method sft, which trains on the chosen responses alone: leave it out"
    of_fusions = {each for fusion in FUSIONS.values() for each in fusion.options}
    if option in {"fusion", "clip", "initial_as_source"} | of_fusions and not method.fused:
        by = "--reference initial" if METHODS[name].fused else f"--method {name}"
        return f"with {by}: the reference is the initial pivot, nothing is fused; leave it out"
    if method.fused:
        fusion = FUSIONS[method.fusion]
        if option in of_fusions and option not in fusion.options:
            return f"with --fusion {method.fusion}: it belongs to {_users(option)}"
        given = (method.clip, method.initial_as_source)
        if reason := fusion.idle(*given, **method.fusion_options).get(option):
            return reason
    if option not in _OWN and option not in of_fusions and option not in method.loss.options:
        return f"with the objective {method.objective}: it belongs to {_users(option)}"
    return None


def _users(option: str) -> str:
    """Names of the losses or fusions that take an option."""
    return ", ".join(_shared_options()[option])
