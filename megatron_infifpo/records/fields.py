"""Fields that preference records of every form may have, and what makes a reply."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_infifpo.records.conversations import system_before
from megatron_infifpo.records.messages import (
    BadRecordError,
    Message,
    check_json,
    from_json,
    kind,
    text_of,
)
from megatron_infifpo.records.rendered_text import rendered_mark

SYSTEM = ("system", "system_prompt", "system_message")
COMMON = {"id", "domain", *SYSTEM, "tools", "chat_template_kwargs"}
# Field -> what to give in its place.
LOST = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio"), "none: only text is scored"
) | {"functions": "the functions in 'tools'"}
# Reasoning that stands before an answer, in the text itself.
THOUGHTS = re.compile(r"\s*([<\[])((?:seed:)?think)[>\]].*?\1/\2[>\]]", re.DOTALL | re.IGNORECASE)
# What chat templates get from elsewhere.
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize")


def label(value: dict[str, Any], name: str, default: str) -> str:
    """Return a short text field that may be absent; whole numbers are taken as text."""
    found = value.get(name)
    if found is None:
        return default
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    text = text_of(found, name).strip()
    if not text:
        raise BadRecordError(
            f"field {name!r} is empty, expected a name; leave it out for {default!r}"
        )
    return text


def system_messages(value: dict[str, Any], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the system message that a field of its own holds, if the prompt has none."""
    found = {name: value[name] for name in SYSTEM if value.get(name)}
    if len({text_of(text, name).strip() for name, text in found.items()}) > 1:
        raise BadRecordError(f"{' and '.join(found)} differ, expected one system message")
    for name, text in found.items():
        if text.strip():
            return system_before([{"role": "system", "content": text}], prompt, name)
    return ()


def check_reply(messages: tuple[Message, ...], name: str, *, hint: str = "") -> None:
    """Refuse what is no reply: the assistant begins and ends it, and says or calls something.

    Args:
        messages: of the reply.
        name: of the field, for errors.
        hint: what to do with an empty one.
    """
    roles = [message["role"] for message in messages]
    if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
        raise BadRecordError(
            f"field {name!r} holds messages of roles {roles} after the prompt, expected a reply: "
            "one message of role assistant, or several that begin and end with one"
        )
    last = messages[-1]
    if not has_answer(last):
        answer = THOUGHTS.sub("", last["content"], count=1)
        reasons = answer != last["content"] or "reasoning_content" in last
        raise BadRecordError(
            f"field {name!r} is empty ({answer!r}{' after the reasoning' if reasons else ''}), "
            f"expected a response with text{hint}"
        )


def has_answer(message: Message) -> bool:
    """Whether an assistant's message says or calls something, beside its reasoning."""
    thoughts = THOUGHTS.match(message["content"])
    answer = message["content"][thoughts.end() :] if thoughts else message["content"]
    return bool(answer.strip() or message.get("tool_calls"))


def is_reply(message: Message) -> bool:
    """Whether what a model has said can be a reply: it has an answer, and no mark of a template."""
    return has_answer(message) and rendered_mark(message["content"], reply=True) is None


def same_reply(one: tuple[Message, ...], other: tuple[Message, ...]) -> bool:
    """Whether two replies are equal, but for outer white space."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a["content"].strip() != b["content"].strip():
            return False
        if {**a, "content": ""} != {**b, "content": ""}:
            return False
    return True


def refuse_lost(value: dict[str, Any]) -> None:
    """Refuse fields whose loss would make another record of this one."""
    for name in LOST.keys() & value.keys():
        if value[name]:
            raise BadRecordError(f"field {name!r} is {kind(value[name])}, expected {LOST[name]}")


def read_tools(value: dict[str, Any], inner: Any) -> tuple[dict[str, Any], ...]:
    """Return the schemas of the functions that may be called; a JSON string is decoded."""
    found = from_json(value.get("tools") or inner)
    if not found:
        return ()
    tools = [from_json(tool) for tool in found] if isinstance(found, list) else [found]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError(
            f"field 'tools' is {kind(found)}, expected a list of JSON schemas of functions, or its "
            "JSON"
        )
    return tuple(check_json(tool, "tools") for tool in tools)


def template_options(value: dict[str, Any]) -> dict[str, Any]:
    """Return the record's variables for the chat template."""
    found = from_json(value.get("chat_template_kwargs"))
    if not found:
        return {}
    if not isinstance(found, dict) or not all(str(name).isidentifier() for name in found):
        raise BadRecordError(
            f"field 'chat_template_kwargs' is {kind(found)}, expected an object: variables of the "
            "chat template"
        )
    for name in RESERVED:
        if name in found:
            raise BadRecordError(
                f"field 'chat_template_kwargs' sets {name!r}, which is no variable of a template "
                "that a record may choose; expected such as enable_thinking"
            )
    return check_json(found, "chat_template_kwargs")


def refuse_rendered(messages: Sequence[Message], name: str) -> None:
    """Refuse text that a chat template has rendered: each model's own would render it again.

    Args:
        messages: of a prompt, or of a reply.
        name: of its field.

    Raises:
        BadRecordError: a message is rendered.
    """
    for message in messages:
        mark = rendered_mark(message["content"], reply=message["role"] == "assistant")
        if mark is not None:
            raise BadRecordError(
                f"{name!r} is rendered by a chat template already (it begins or ends with "
                f"{mark!r}), expected plain text or messages: every model's own template renders "
                "them"
            )
