"""What vLLM is asked about a text, and what is read from its answer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_infifpo.errors import UserError

NEVER = -9999.0  # what servers write for minus infinity


class Asked(NamedTuple):
    """A text whose tokens' log-probs are asked for."""

    ids: list[int]  # [L]
    rows: list[int]  # [k], each predicts the token behind it, which is scored
    record: str  # for errors


class Answer(NamedTuple):
    """What an engine says of a text of L tokens."""

    ids: Sequence[int] | None  # [L] that it has read; None: it does not say
    positions: Sequence[Mapping[int, float] | None] | None  # [L] log-probs by id; of the first none


class Found(NamedTuple):
    """Log-probs of a text's scored tokens."""

    own: Tensor  # [k]
    top: Tensor  # [k, n], falling
    top_ids: Tensor  # [k, n]


def read(text: Asked, said: Answer, top: int) -> Found:
    """Take a text's log-probs from an answer.

    Args:
        text: that was asked about.
        said: the answer.
        top: most probable ids that were asked for.

    Raises:
        UserError: it is of other tokens, or has not all of the log-probs.
    """
    if said.ids is not None and list(said.ids) != text.ids:
        raise UserError(_other_ids(text, list(said.ids)))
    if said.positions is None:
        raise UserError(f"vLLM gives no prompt_logprobs of record {text.record}")
    if len(said.positions) != len(text.ids):
        raise UserError(
            f"vLLM gives log-probs of {len(said.positions)} tokens of record {text.record}, which "
            f"has {len(text.ids)}: it has read other token ids than were sent"
        )
    for place, (token, found) in enumerate(zip(text.ids, said.positions, strict=True)):
        if place == 0:
            continue  # nothing is before it
        if found is None:
            raise UserError(
                f"vLLM gives no log-prob of token {place} of record {text.record}: with a server, "
                "start it with --no-enable-prefix-caching"
            )
        if token not in found:
            raise UserError(_other_ids(text, list(found), place))
    own, ranked = [], []
    for place in (row + 1 for row in text.rows):
        token, position = text.ids[place], said.positions[place]
        assert position is not None, "as has been checked"
        own.append(_checked(position[token], text, place))
        ranked.append(_ranked(position, token, top, text))
    shape = len(own), top
    values = torch.tensor([[value for _, value in one] for one in ranked], dtype=torch.float32)
    top_ids = torch.tensor([[i for i, _ in one] for one in ranked], dtype=torch.int64)
    return Found(torch.tensor(own, dtype=torch.float32), values.view(shape), top_ids.view(shape))


def _other_ids(text: Asked, found: list[int], place: int | None = None) -> str:
    """Say that a model has read something else."""
    where = "" if place is None else f" at token {place}, where {text.ids[place]} was sent"
    shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
    return (
        f"vLLM has read other token ids than were sent for record {text.record}: {shown}{where}; "
        "expected a model with this tokenizer, and nothing added to what is sent"
    )


def _checked(value: float, text: Asked, place: int) -> float:
    """Return a log-prob that is one."""
    if not NEVER < value < 1e-3:  # minus infinity and NaN are neither
        raise UserError(
            f"vLLM gives token {place} of record {text.record} the log-prob {value}, expected a "
            "number of at most 0: with a server, leave its --logprobs-mode at raw_logprobs"
        )
    return min(value, 0.0)


def _ranked(found: Mapping[int, float], own: int, top: int, text: Asked) -> list[tuple[int, float]]:
    """Return the most probable ids of a position, falling.

    It has so many, and the text's own token beside them unless that is one of them.
    """
    if top == 0:
        return []
    ids = [i for i in found if i != own] if len(found) == top + 1 else list(found)
    if len(ids) != top:
        raise UserError(
            f"vLLM gives {len(found)} log-probs of a token of record {text.record}, expected the "
            f"{top} most probable ones"
        )
    return sorted(((i, found[i]) for i in ids), key=lambda pair: -pair[1])
