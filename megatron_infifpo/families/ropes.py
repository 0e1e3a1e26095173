"""Rotary embeddings: from config.json to Megatron's arguments, or to frequencies of transformers.

A rope is a dictionary of plain values: `rope_type`, `rope_theta`, `attention_factor` (what cosines
and sines are multiplied by), and what its type needs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.fields import refuse, required

# Megatron hard-codes these of Llama 3's rope scaling; only the factor is an argument.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Scalings whose frequencies do not depend on the length of a text.
SCALED = ("default", "linear", "llama3", "yarn")
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *LLAMA3_ROPE),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor",
        "long_factor",
    ),
}  # fmt: skip
# A rope that rotates nothing.
NONE = {"rope_type": "none", "rope_theta": 1.0, "attention_factor": 1.0}
_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters in the form of transformers 5, also from files of transformers 4.

    Raises:
        UserError: a file has both forms, and a field in the one that is not followed.
    """
    scaling, known = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    # Where a file has both, rope_scaling is what somebody added, and transformers follows it alone.
    parameters = dict(scaling or known)
    if scaling and known.get("rope_theta") not in (None, _theta(config, scaling)):
        raise UserError(
            "config.json has rope_scaling and rope_parameters, and transformers would leave out "
            f"rope_theta {known['rope_theta']!r} of the latter: put all of it into rope_parameters"
        )
    parameters["rope_theta"] = _theta(config, parameters)
    if parameters.get("partial_rotary_factor") is None:
        parameters["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    if config.get("original_max_position_embeddings") is not None:
        # transformers follows it wherever it stands beside the rope's own.
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return parameters


def _theta(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    found = parameters.get("rope_theta")
    return (config.get("rope_theta") if found is None else found) or 10000.0


def rope_args(
    config: Mapping[str, Any],
    *,
    types: Sequence[str] = SCALED,
    partial: bool = False,
    megatrons: bool = True,
) -> dict[str, Any]:
    """Megatron arguments of the rotary embedding.

    Args:
        types: rope types that the family may have.
        partial: the family may rotate only a part of each head.
        megatrons: by Megatron's arguments alone, where that is possible.

    Returns:
        With an entry `rope` where Megatron has no arguments for it: see `families/ropes.py`.

    Raises:
        UserError: a rope that the family does not have.
    """
    parameters = rope(config)
    kind, percent = parameters["rope_type"], parameters["partial_rotary_factor"]
    refuse(parameters, "rope_type", unless=types, reason=_other_rope(kind))
    if not partial and percent != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor is {percent}, expected 1.0: "
            f"{config['model_type']} models rotate whole heads"
        )
    if kind == "default":
        parameters.pop("original_max_position_embeddings", None)
    heads = required(config, "num_attention_heads")
    head = config.get("head_dim") or required(config, "hidden_size") // heads
    own = canonical(
        parameters,
        context=required(config, "max_position_embeddings"),
        rotated=int(head * float(percent)),
    )
    # Megatron hard-codes all but the factor.
    as_megatron = (
        megatrons and kind == "llama3" and all(own[k] == v for k, v in LLAMA3_ROPE.items())
    )
    theta = parameters["rope_theta"]
    args = {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        # Megatron's flag is an integer; a fraction would be one only in a broken file.
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": float(percent),
        "use_rope_scaling": as_megatron,
        "rope_scaling_factor": own["factor"] if as_megatron else 8.0,
    }
    return args if kind == "default" or as_megatron else args | {"rope": own}


def _other_rope(kind: str) -> str:
    if kind == "dynamic":
        return "its angles would depend on the longest text of a row"
    if kind in ("longrope", "su"):
        return "this family has no factors per frequency"
    return "Megatron's rotary embedding would compute other angles"


def plain(theta: float) -> dict[str, Any]:
    """Return a rope that scales nothing."""
    return {"rope_type": "default", "rope_theta": float(theta), "attention_factor": 1.0}


def canonical(parameters: Mapping[str, Any], *, context: int, rotated: int) -> dict[str, Any]:
    """Make a rope of a config.json's parameters, with defaults filled in and nothing else.

    Args:
        parameters: with `rope_type` and `rope_theta`, in the fields of transformers 5.
        context: max_position_embeddings.
        rotated: channels of a head that are rotated.

    Raises:
        UserError: a field that its type does not have, or lacks.
    """
    kind = parameters["rope_type"]
    for name, value in parameters.items():
        if value is not None and name not in _OF_ALL and name not in _KNOWN[kind]:
            raise UserError(
                f"config.json: a rope of type {kind} has {name} {value!r}, which is not known: "
                f"expected {', '.join(_KNOWN[kind]) or 'no fields of scaling'}"
            )
    rope = plain(parameters["rope_theta"]) | {"rope_type": kind}
    if kind == "linear":
        rope |= {"factor": _number(parameters, "factor")}
    elif kind == "llama3":
        rope |= {name: _number(parameters, name) for name in _KNOWN[kind]}
    elif kind == "yarn":
        rope |= _yarn(parameters, context)
    elif kind == "longrope":
        rope |= _longrope(parameters, context, rotated)
    return rope


def _yarn(parameters: Mapping[str, Any], context: int) -> dict[str, Any]:
    """arXiv 2309.00071."""
    factor, scale = _number(parameters, "factor"), parameters.get("attention_factor")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale is None and mscale and all_dim:
        scale = _mscale(factor, mscale) / _mscale(factor, all_dim)
    betas = {name: float(parameters.get(name) or default) for name, default in _YARN.items()}
    return betas | {
        "factor": factor,
        "original_max_position_embeddings": _original(parameters, context),
        "attention_factor": float(_mscale(factor) if scale is None else scale),
        "truncate": True if parameters.get("truncate") is None else bool(parameters["truncate"]),
    }


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(parameters: Mapping[str, Any], context: int, rotated: int) -> dict[str, Any]:
    """arXiv 2402.13753; the factors of short texts, unless those of long ones are the same."""
    original, scale = _original(parameters, context), parameters.get("attention_factor")
    given = parameters.get("factor")
    factor = context / original if given is None else _number(parameters, "factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    found = {name: _factors(parameters, name, rotated) for name in ("short_factor", "long_factor")}
    return {
        "factors": found["short_factor"],
        "one_list": found["short_factor"] == found["long_factor"],
        "attention_factor": float(scale),
        "original_max_position_embeddings": original,
    }


def _original(parameters: Mapping[str, Any], context: int) -> int:
    found = parameters.get("original_max_position_embeddings")
    if found is None:
        return context
    if type(found) is not int or found < 1:
        raise UserError(
            f"config.json: original_max_position_embeddings of its rope is {found!r}, expected a "
            "positive integer"
        )
    return found


def _factors(parameters: Mapping[str, Any], name: str, rotated: int) -> tuple[float, ...]:
    found = parameters.get(name)
    if not isinstance(found, list | tuple) or len(found) != rotated // 2:
        what = f"{len(found)} values" if isinstance(found, list | tuple) else repr(found)
        raise UserError(
            f"config.json: {name} of its rope is {what}, expected {rotated // 2} numbers: one for "
            "each frequency of a head"
        )
    return tuple(_number({name: value}, name) for value in found)


def _number(parameters: Mapping[str, Any], name: str) -> float:
    found: Any = parameters.get(name)
    if type(found) not in (int, float) or not 0 < found < math.inf:
        got = "has no" if found is None else f"has {found!r} as"
        raise UserError(
            f"config.json: its rope of type {parameters.get('rope_type', 'longrope')} {got} "
            f"{name}, expected a positive number"
        )
    return float(found)


def inverse_frequencies(rope: Mapping[str, Any], rotated: int) -> Tensor:
    """Radians a position that each pair of channels is rotated by: `[rotated / 2]` in float32.

    In the order of transformers' operations, to the last bit.

    Args:
        rope: as `canonical` makes it.
        rotated: channels of a head that are rotated.
    """
    kind, base = rope["rope_type"], rope["rope_theta"]
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    unscaled = 1.0 / base**exponents
    if kind == "none":
        return torch.zeros_like(unscaled)
    if kind == "linear":
        return unscaled / rope["factor"]
    if kind == "llama3":
        return _of_llama3(unscaled, rope)
    if kind == "yarn":
        return _of_yarn(base**exponents, rope)
    if kind == "longrope":
        return 1.0 / (torch.tensor(rope["factors"], dtype=torch.float32) * base**exponents)
    return unscaled


def _of_llama3(unscaled: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Slow frequencies divided by the factor, fast ones not, and a smooth way between them."""
    low, high, original = (rope[name] for name in LLAMA3_ROPE)
    lengths = 2 * math.pi / unscaled
    slow = torch.where(lengths > original / low, unscaled / rope["factor"], unscaled)
    share = (original / lengths - low) / (high - low)
    between = (1 - share) * slow / rope["factor"] + share * slow
    middle = ~(lengths < original / high) * ~(lengths > original / low)
    return torch.where(middle, between, slow)


def _of_yarn(powers: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Between dividing by the factor and not, by how often a frequency turns in a text."""
    base, rotated = rope["rope_theta"], 2 * len(powers)

    def channel(turns: float) -> float:
        """The channel that turns so often in a text of the original length."""
        length = rope["original_max_position_embeddings"]
        return (rotated * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(base))

    first, last = channel(rope["beta_fast"]), channel(rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(len(powers), dtype=torch.float32) - first) / (last - first)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
