"""Forms of preference records: the fields by which each is known, and what reads it.

`FORMS` has them in order: a record is of the first form whose fields it has, none of them null.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_infifpo.records.form_readers import (
    Parts,
    read_by_name,
    read_by_score,
    read_by_sign,
    read_helpsteer2,
    read_messages_and_rejected,
    read_openai,
    read_pair,
)
from megatron_infifpo.records.lists import read_list
from megatron_infifpo.records.messages import BadRecordError


@dataclass(frozen=True, slots=True)
class Form:
    """One form.

    Attributes:
        fields: the fields by which it is known; all are there.
        read: takes the record and a set for what nothing uses inside its fields; returns its parts.
        rates: it rates several responses; `read` makes a pair, or with `lists=True` a list.
    """

    fields: tuple[str, ...]
    read: Callable[..., Parts]
    rates: bool = False


def form_of(value: dict[str, Any]) -> Form:
    """Return the form of a record.

    Raises:
        BadRecordError: it has none; says which fields it has and which forms there are.
    """
    for form in FORMS.values():
        if all(value.get(name) is not None for name in form.fields):
            return form
    found = ", ".join(sorted(str(k) for k in value if value[k] is not None)) or "nothing"
    if value.get("chosen") is not None:
        raise BadRecordError(
            f"field 'rejected' is missing, found {found}; expected a reply as a string or a list "
            "of messages"
        )
    hint = next((text for fields, text in NO_PAIRS.items() if value.keys() >= set(fields)), None)
    others = "; ".join(", ".join(form.fields) for form in [*FORMS.values()][1:])
    raise BadRecordError(
        f"field 'chosen' is missing, found {found}; expected prompt, chosen and rejected, or "
        + (hint or f"the fields of another form (docs/file-formats.md): {others}")
    )


SAMPLE = "(infifpo sample gives others, infifpo label compares them)"
NO_PAIRS = {
    ("prompt", "completion", "label"): "a better and a worse completion of one prompt: join "
    "those of label true and false",
    ("prompt", "response"): f"the best and the worst rated response of one prompt {SAMPLE}",
    ("messages",): f"another reply to compare the conversation's with {SAMPLE}",
    ("conversations",): f"another reply to compare the conversation's with {SAMPLE}",
}
"""Fields of what is no pair -> what to give instead."""


# What a record says -> the field that it says is better.
_RESPONSES = {"0": "response_0", "1": "response_1"}
_CONVERSATIONS = {"model_a": "conversation_a", "model_b": "conversation_b"}
_COMMENTS = {"1": "human_ref_A", "0": "human_ref_B"}

FORMS: dict[str, Form] = {
    # Ours; TRL, UltraFeedback-binarized, Tulu 3, Skywork, orca pairs, Anthropic's hh; ShareGPT.
    "pair": Form(("chosen", "rejected"), partial(read_pair, names=("chosen", "rejected"))),
    "pair of responses": Form(
        ("chosen_response", "rejected_response"),
        partial(read_pair, names=("chosen_response", "rejected_response")),
    ),
    "Stack Exchange": Form(
        ("response_j", "response_k"), partial(read_pair, names=("response_j", "response_k"))
    ),
    "HelpSteer3": Form(
        ("context", "response1", "response2", "overall_preference"),
        partial(
            read_by_sign,
            prompt="context",
            first="response1",
            second="response2",
            sign="overall_preference",
        ),
    ),
    "HelpSteer2": Form(
        ("prompt", "response_1", "response_2", "preference_strength"),
        read_helpsteer2,
    ),
    "OpenAI": Form(("input", "preferred_output", "non_preferred_output"), read_openai),
    "Nectar": Form(
        ("prompt", "answers"),
        partial(
            read_by_score, prompt="prompt", answers="answers", text="answer", score="rank", best=min
        ),
        rates=True,
    ),
    "UltraFeedback": Form(
        ("instruction", "completions"),
        partial(
            read_by_score,
            prompt="instruction",
            answers="completions",
            text="response",
            score="overall_score",
        ),
        rates=True,
    ),
    "NeMo-RL": Form(
        ("context", "completions"),
        partial(
            read_by_score,
            prompt="context",
            answers="completions",
            text="completion",
            score="rank",
            best=min,
        ),
        rates=True,
    ),
    "ms-swift": Form(("messages", "rejected_response"), read_messages_and_rejected),
    "PKU-SafeRLHF": Form(
        ("prompt", "response_0", "response_1", "better_response_id"),
        partial(read_by_name, prompt="prompt", replies=_RESPONSES, winner="better_response_id"),
    ),
    "SHP": Form(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        partial(read_by_name, prompt="history", replies=_COMMENTS, winner="labels"),
    ),
    "Chatbot Arena": Form(
        ("conversation_a", "conversation_b", "winner"),
        partial(read_by_name, prompt=None, replies=_CONVERSATIONS, winner="winner"),
    ),
    # Ours; what infifpo sample and infifpo label --list write.
    "list": Form(("responses",), read_list),
}
"""Name -> form, in the order in which a record is tried."""
