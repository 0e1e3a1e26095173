"""Fields of a config.json that must be there, or must not have other values."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_infifpo.errors import UserError


def required(config: Mapping[str, Any], field: str) -> Any:
    """Return a field that `config.json` must have."""
    if config.get(field) is None:
        raise UserError(
            f"config.json of this {config.get('model_type')} model has no {field}: "
            "take the file from the model's original repository"
        )
    return config[field]


def refuse(config: Mapping[str, Any], field: str, *, unless: Sequence[Any], reason: str) -> None:
    """Raise UserError if a field has another value than these."""
    if config.get(field) not in unless:
        expected = " or ".join(repr(value) for value in unless if value is not None) or "none"
        raise UserError(
            f"config.json: {field} is {config.get(field)!r}, expected {expected}: {reason}"
        )
