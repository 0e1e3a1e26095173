"""A file of responses with the log-probs that an engine gave them while it sampled, temperature 1.

A line is `{"id", "prompt_ids", "response_ids", "logprobs", "model", "weights_sha256",
"weights_dtype"}`, in older files without the last two. `infifpo sample` writes it, and a training
run tells by it whether the model that it starts from is the one that has answered.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import write_text

_WEIGHTS = ("weights_sha256", "weights_dtype")


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredResponse:
    """One response, as it was sampled.

    Attributes:
        id: of its prompt.
        prompt_ids: int32 `[P]`, with the generation prompt.
        response_ids: int32 `[L]`, as they were sampled; with the end of the turn unless it is cut.
        logprobs: float32 `[L]`, nats.
        model: its name.
        weights_sha256: its weights' fingerprint; None where nobody knows it.
        weights_dtype: the data type that they are stored in, which the fingerprint depends on.
    """

    id: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    model: str
    weights_sha256: str | None = None
    weights_dtype: str | None = None


def write_measured(path: str | Path, responses: Sequence[MeasuredResponse]) -> None:
    """Write the file whole or not at all; several processes may do so at once.

    Args:
        path: of the file.
        responses: at least one.
    """
    assert responses, "a file without responses would agree with every model"
    lines = [
        json.dumps(
            {
                "id": one.id,
                "prompt_ids": one.prompt_ids.tolist(),
                "response_ids": one.response_ids.tolist(),
                "logprobs": one.logprobs.tolist(),
                "model": one.model,
                "weights_sha256": one.weights_sha256,
                "weights_dtype": one.weights_dtype,
            }
        )
        for one in responses
    ]
    write_text(path, "\n".join(lines) + "\n", by_process=True)


def read_measured(path: str | Path) -> list[MeasuredResponse]:
    """Read such a file.

    Raises:
        UserError: it cannot be read, or names the line that is none of it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error}), expected what infifpo sample wrote"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_response(json.loads(line)))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: {error or 'malformed'}, expected a line of infifpo sample's "
                "OUTPUT.measured: an object with id, prompt_ids, response_ids, logprobs, model"
            ) from None
    if not found:
        raise UserError(f"{path} is empty, expected the responses that infifpo sample measured")
    return found


def _response(value: Any) -> MeasuredResponse:
    """Read a line.

    Raises:
        OverflowError, TypeError, ValueError: something of it is missing or malformed.
    """
    if not isinstance(value, dict):
        raise TypeError(f"found {type(value).__name__}")
    if missing := {"id", "prompt_ids", "response_ids", "logprobs", "model"} - value.keys():
        raise ValueError(f"no {', '.join(sorted(missing))}")
    for name in ("id", "model"):
        if not isinstance(value[name], str):
            raise TypeError(f"{name} is {value[name]!r}, no text")
    weights: dict[str, Any] = {name: value.get(name) for name in _WEIGHTS}
    for name, one in weights.items():
        if one is not None and not isinstance(one, str):
            raise TypeError(f"{name} is {one!r}, no text")
    if None in weights.values() and len(set(weights.values())) > 1:
        raise ValueError("weights_sha256 and weights_dtype go together")
    ids = {name: _numbers(value, name, int) for name in ("prompt_ids", "response_ids")}
    logprobs = _numbers(value, "logprobs", int | float)
    if min(map(min, ids.values())) < 0:
        raise ValueError("a token's id is negative")
    if not np.isfinite(logprobs).all():
        raise ValueError("a log-prob is not finite")
    if len(logprobs) != len(ids["response_ids"]):
        raise ValueError(f"{len(logprobs)} logprobs of {len(ids['response_ids'])} response_ids")
    arrays: dict[str, Any] = {name: np.array(numbers, np.int32) for name, numbers in ids.items()}
    return MeasuredResponse(
        value["id"],
        **arrays,
        logprobs=np.array(logprobs, np.float32),
        model=value["model"],
        **weights,
    )


def _numbers(value: dict[str, Any], name: str, kind: Any) -> list[Any]:
    found = value[name]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} is no list of numbers, or is empty")
    for one in found:
        if not isinstance(one, kind) or isinstance(one, bool):
            raise TypeError(f"{name} holds {repr(one)[:40]}")
    return found
