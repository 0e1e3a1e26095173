"""Messages of a conversation: every accepted spelling to one plain form.

Read are OpenAI's messages (`role`, `content` as text or text parts, `tool_calls`, `function_call`)
and ShareGPT's (`from`, `value`), with the reasoning that models give beside their answer.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""`{"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}`, and where it
has them `reasoning_content`, `tool_calls`, `name`, `tool_call_id`."""

SYSTEM_ROLES = ("system", "developer")
# ShareGPT's turns, and OpenAI's older ones, that hold a call rather than text.
CALLS = ("function_call", "tool_call")
ROLES = {role: role for role in (*SYSTEM_ROLES, "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(CALLS, "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "function"), "tool"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")
# Messages in a text as str() writes them, which no reader of JSON understands.
PRINTED = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)':")


class BadRecordError(Exception):
    """What is wrong with one record; whoever reads the file adds where."""


def reply(text: str) -> tuple[Message, ...]:
    """Return the reply that is just this text."""
    return ({"role": "assistant", "content": text},)


def plain_text(messages: Sequence[Message]) -> str | None:
    """Return the text of a reply that is just text; None if it is more than that."""
    if len(messages) == 1 and len(messages[0]) == 2 and messages[0]["role"] == "assistant":
        return messages[0]["content"]
    return None


def listed(message: Message) -> list[Any]:
    """Return [role, content] and, of a message that has more, the rest: one form for hashes."""
    rest = {name: message[name] for name in sorted(message) if name not in ("role", "content")}
    return [message["role"], message["content"], *([rest] if rest else [])]


def read_messages(value: Any, name: str, ignored: set[str] | None = None) -> tuple[Message, ...]:
    """Return messages in their plain form.

    Args:
        value: a list of messages, or its JSON text as tables without nesting have it.
        name: of the field, for errors.
        ignored: receives the keys of messages that nothing uses, as `(messages) KEY`.

    Raises:
        BadRecordError: something is malformed, or is not text.
    """
    found = from_json(value)
    if not isinstance(found, list):
        raise BadRecordError(
            f"field {name!r} is {kind(value)}, expected a string or a list of messages"
        )
    return tuple([_message(item, name, i, ignored) for i, item in enumerate(found)])


def messages_in_text(value: str) -> list[Any] | None:
    """Return the messages that a text is the JSON of, as .csv and some data sets have them.

    Raises:
        BadRecordError: it is what Python prints for messages, which cannot be read back.
    """
    if value.lstrip()[:1] not in ("[", "{"):
        return None
    if PRINTED.match(value):
        raise BadRecordError(
            f"found the text {short(value)}: messages as Python prints them, expected JSON "
            "(write them with json.dumps)"
        )
    found = from_json(value)
    items = [found] if isinstance(found, dict) else found
    if not isinstance(items, list) or not items:
        return None
    are_messages = all(
        isinstance(m, dict) and str(m.get("role", m.get("from"))) in ROLES for m in items
    )
    return items if are_messages else None


def _message(item: Any, name: str, number: int, ignored: set[str] | None) -> Message:
    item = from_json(item)
    if not isinstance(item, dict):
        raise BadRecordError(
            f"message '{name}[{number}]' is {kind(item)}, expected an object with role and content "
            "(or from and value)"
        )
    keys = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    spelled, content = item.get(keys[0]), item.get(keys[1])
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    where = f"{name}[{number}]"
    if role is None:
        if spelled is None:
            raise BadRecordError(
                f"message {where!r} has {', '.join(map(str, item)) or 'nothing'}, expected role "
                "and content (or from and value)"
            )
        raise BadRecordError(
            f"message {where!r} has the role {spelled!r}, expected one of {', '.join(ROLES)}"
        )
    if len(item) == 2 and type(content) is str and spelled not in CALLS:
        return {"role": role, "content": text_of(content, where)}
    message = _with_calls(item, role, str(spelled), content, where)
    for key in ("name", *(("tool_call_id",) if role == "tool" else ())):
        if _is_there(item.get(key)):
            message[key] = text_of(item[key], f"{where}.{key}")
    if ignored is not None:
        used = {*keys, *message, *(REASONING if role == "assistant" else ()), "function_call"}
        ignored |= {f"(messages) {k}" for k in item if k not in used and _is_there(item[k])}
    return message


def _with_calls(item: dict[str, Any], role: str, spelled: str, content: Any, where: str) -> Message:
    """Return a message's role, content, reasoning and tool calls."""
    found = item.get("tool_calls") or item.get("function_call")
    if spelled in CALLS:
        found, content = content, None
    calls = _tool_calls(found, where) if found else []
    if calls and role != "assistant":
        raise BadRecordError(
            f"message {where!r} of role {role} has tool_calls, expected them in messages of role "
            "assistant"
        )
    if content is None and calls:
        content = ""
    text, thoughts = _content(content, where)
    for key in REASONING if role == "assistant" else ():
        if _is_there(item.get(key)):
            thoughts.append(_content(item[key], f"{where}.{key}")[0])
    if len(set(thoughts)) > 1:
        raise BadRecordError(
            f"message {where!r} has reasoning twice, and not the same, expected it in one of "
            f"{', '.join(REASONING)}"
        )
    message: Message = {"role": role, "content": text}
    if thoughts and thoughts[0]:
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = calls
    return message


def _content(value: Any, where: str) -> tuple[str, list[str]]:
    """Return a content's text, and the reasoning that stands among its parts."""
    if isinstance(value, str):
        return text_of(value, where), []
    if value is None:
        raise BadRecordError(
            f"message {where!r} has no content (null or absent) and no tool_calls, expected text; "
            "leave the message out if there is none"
        )
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{where!r} is {kind(value)}, expected a string or text parts")
    texts, thoughts = [], []
    for number, part in enumerate(value):
        at = f"{where}[{number}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        form = part.get("type", "text") if isinstance(part, dict) else None
        if form in TEXT_PARTS:
            texts.append(text_of(part.get("text"), at))
        elif form in THINKING_PARTS:
            thoughts.append(_content(part.get(form, part.get("text")), at)[0])
        else:
            raise BadRecordError(
                f"content part {at!r} is {kind(part) if form is None else f'of type {form!r}'}, "
                "expected parts of type 'text': only text is scored, no images and no audio"
            )
    return "".join(texts), ["".join(thoughts)] if thoughts else []


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form, with arguments as objects, as chat templates expect them."""
    value = from_json(value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = from_json(call)
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRecordError(
                f"message {where!r} has tool_calls with {kind(call)}, expected objects like "
                '{"type": "function", "function": {"name": text, "arguments": object}} or '
                '{"name": text, "arguments": object}'
            )
        found = inner.get("arguments", inner.get("parameters"))
        arguments = {} if found in (None, "") else from_json(found)
        if not isinstance(arguments, dict):
            raise BadRecordError(
                f"message {where!r} calls {inner['name']!r} with the arguments {short(found)}, "
                "expected an object, or the JSON of one"
            )
        function = {"name": inner["name"], "arguments": arguments}
        outer = {"id": call["id"]} if _is_there(call.get("id")) else {}
        call = outer | {"type": "function", "function": function}
        calls.append(check_json(call, f"{where}.tool_calls"))
    return calls


def from_json(value: Any) -> Any:
    """Decode a text that is a JSON object or array; return anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_json(value: Any, name: str) -> Any:
    """Return a JSON value whose texts UTF-8 can encode.

    Raises:
        BadRecordError: one of them cannot be, or the value is no JSON.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(_half_a_pair(name, error)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecordError(
            f"{name!r} cannot be written as JSON ({error}), expected JSON"
        ) from None
    return value


def text_of(value: Any, name: str) -> str:
    """Return a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise BadRecordError(f"{name!r} is {kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(_half_a_pair(name, error)) from None
    return value


def _half_a_pair(name: str, error: UnicodeEncodeError) -> str:
    return (
        f"{name!r} holds half a surrogate pair ({error.object[error.start]!a}) at character "
        f"{error.start}, expected valid Unicode text"
    )


def _is_there(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def kind(value: Any) -> str:
    """Describe a JSON value in an error: its type and its start."""
    names: dict[type, str] = {dict: "an object", list: "a list", bool: "a boolean", str: "a string"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return f"{names.get(type(value), type(value).__name__)} ({short(value)})"


def short(value: Any, limit: int = 60) -> str:
    """Return the start of what Python prints for a value."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
