"""A preset with some options changed: defaults filled in, and what makes no sense refused."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import flag
from megatron_infifpo.losses import MEANS_FACTOR, Loss
from megatron_infifpo.methods.method import METHODS, OWN, Method, shared_options
from megatron_infifpo.options import Option
from megatron_infifpo.reference import FUSIONS
from megatron_infifpo.source_values import VALUE_OPTIONS

_OF_WEIGHTS = ("pair_weights", "verdict_scale", "verdict_cut")


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
    preset, shared = METHODS[name], shared_options()
    for option, value in options.items():
        if option in OWN:
            _check(option, OWN[option], value)
        elif option not in shared:
            known = ", ".join((*OWN, *shared))
            raise UserError(f"{option!r} is no option of a method, expected one of {known}")
    own = {option: value for option, value in options.items() if option in OWN}
    given = {option: value for option, value in options.items() if option in shared}
    method = replace(preset, **own, options=MappingProxyType({**preset.options, **given}))
    for option in options:
        if reason := _why_useless(name, method, option):
            raise UserError(f"{flag(option)} has no effect {reason}")
    scale = MEANS_FACTOR if method.length_normalization else 1
    if method.pair_weights is not None and method.verdict_scale is None:
        method = replace(method, verdict_scale=float(scale))
    loss = method.loss
    if loss is None:
        return replace(method, options=MappingProxyType(_completed(method)))
    if reason := _why_impossible(method, loss):
        user = f"--objective {method.objective}" if "objective" in options else f"--method {name}"
        raise UserError(f"{user} {reason}")
    if "beta" not in options:
        method = replace(method, beta=loss.beta * scale)
    return replace(method, options=MappingProxyType(_completed(method)))


def _completed(method: Method) -> dict[str, Any]:
    """Return the options, with what is needed and was not given, all in their ranges."""
    found = dict(method.options)
    users = [(f"--objective {method.objective}", method.loss_declares)]
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
    if option in _OF_WEIGHTS:
        return _why_no_weights(name, method, option)
    if method.loss is None or METHODS[name].loss is None:
        if method.token_loss is not None and option in method.loss_declares:
            values = {name: method.loss_option(name) for name in method.loss_declares}
            return method.token_loss.idle(**values).get(option)
        if option not in OWN:
            return f"with --method {name}: it belongs to {_users(option)}"
        return f"with --method {name}, which trains on the chosen responses alone: leave it out"
    of_fusions = {each for fusion in FUSIONS.values() for each in fusion.options}
    of_references = {"fusion", "clip", "initial_as_source", *VALUE_OPTIONS} | of_fusions
    if option in of_references and not method.fused:
        by = "--reference initial" if METHODS[name].fused else f"--method {name}"
        return f"with {by}: the reference is the initial pivot, nothing is fused; leave it out"
    if method.fused:
        fusion = FUSIONS[method.fusion]
        if option in of_fusions and option not in fusion.options:
            return f"with --fusion {method.fusion}: it belongs to {_users(option)}"
        if option == "clip_by" and not method.clip:
            return "with sources that are not clipped: give --clip, too"
        clipped = method.options.get("clip_by", "response") if method.clip else None
        if reason := _why_no_values(method, method.loss, clipped, option):
            return reason
        mirrored = method.responses == 2 and method.source_values != "raw"
        given = (clipped, method.initial_as_source, mirrored)
        if reason := fusion.idle(*given, **method.fusion_options).get(option):
            return reason
    if option == "sft_weight" and method.loss.responses is None:
        return (
            f"with the objective {method.objective}: it compares a list, of which no response is "
            "the chosen one; leave it out"
        )
    if option not in OWN and option not in of_references | set(method.loss_declares):
        return f"with the objective {method.objective}: it belongs to {_users(option)}"
    return None


def _why_no_values(method: Method, loss: Loss, clipped: str | None, option: str) -> str | None:
    """Say why an option of the sources' values has no effect, or None.

    Args:
        method: with a fused reference.
        loss: its loss.
        clipped: by what sources are clipped, None: they are not.
        option: any.
    """
    values, moved = method.source_values, clipped != "response" and FUSIONS[method.fusion].fixed
    if option == "source_values" and values == "centred" and moved and loss.differences:
        return (
            f"with --fusion {method.fusion} and the objective {method.objective}, where responses "
            "are not clipped each: centring moves a record's reference values all alike, and only "
            "their differences count; leave it out"
        )
    if option == "clip_by" and clipped == "pair" and values != "raw" and method.responses == 2:
        return (
            f"with --source-values {values}: both responses of a pair are clipped or none is, by "
            "response too; leave it out"
        )
    return None


def _why_no_weights(name: str, method: Method, option: str) -> str | None:
    """Say why an option of the pairs' weights has no effect, or None."""
    if method.pair_weights is None:
        return "without --pair-weights, agreement or best-source: give it, or leave this out"
    by_sign = method.pair_weights == "best-source" and method.verdict_cut == 0.5
    if option == "verdict_scale" and by_sign:
        return (
            "with --pair-weights best-source --verdict-cut 0.5: the verdict of one source is above "
            "0.5 where its margin is above 0, whatever the scale; leave it out"
        )
    if method.token_loss is not None and method.objective != "sft":
        return (
            f"with --method {name}, whose sources teach each token: weights are of pairs, and of "
            "SFT; leave it out"
        )
    if method.loss is not None and (method.responses is None or method.several_pairs):
        looks = "lists" if method.responses is None else "the pairs of a row together"
        return (
            f"with the objective {method.objective}: it compares {looks}, and weights are of "
            "single pairs; leave it out"
        )
    return None


def _why_impossible(method: Method, loss: Loss) -> str | None:
    """Say why a method makes no sense, whichever of its options were given, or None."""
    if loss.teacher and not method.fused:
        return (
            "learns from its reference: the initial pivot would teach itself, with a loss of 0; "
            "expected --reference fused"
        )
    if method.fused and method.clip and loss.responses is None and "rewards" not in loss.reads:
        return (
            "does not know which responses are the better ones, and --clip needs to: expected "
            "--no-clip"
        )
    return None


def _users(option: str) -> str:
    """Names of the losses or fusions that take an option."""
    return ", ".join(shared_options()[option])
