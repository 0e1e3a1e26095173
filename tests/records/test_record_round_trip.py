"""What is written of a record is read back as the same one, whatever its conversations are."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.records.messages import ROLES, BadRecordError, Message
from megatron_infifpo.records.records import PreferenceRecord, parse_record, reply
from megatron_infifpo.records.split import to_json

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
FILLED = TEXT.filter(str.strip) | st.sampled_from(
    ["[1]", '[{"role": "user", "content": "x"}]', "\n\nHuman: a\n\nAssistant: b", "[{'role': 'x'}]"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    TEXT,
    st.dictionaries(TEXT, JSON, max_size=2),
)


@st.composite
def messages(draw, *roles: str) -> Message:
    message = {"role": draw(st.sampled_from(roles)), "content": draw(FILLED)}
    if message["role"] == "assistant":
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT)
        if draw(st.booleans()):
            message["tool_calls"] = draw(st.lists(CALLS, min_size=1, max_size=2))
    elif message["role"] == "tool" and draw(st.booleans()):
        message["tool_call_id"] = draw(TEXT)
    return message


@st.composite
def replies(draw) -> tuple[Message, ...]:
    if draw(st.booleans()):
        return reply(draw(FILLED))
    inside = draw(st.lists(messages("assistant", "tool", "user"), max_size=2))
    ends = (draw(messages("assistant")), draw(messages("assistant")))
    return (ends[0], *inside, *ends[1:]) if inside else ends[:1]


@settings(max_examples=60)
@given(
    st.lists(messages(*sorted(set(ROLES.values()))), max_size=3),
    messages("user", "tool"), replies(), replies(),
    st.lists(st.dictionaries(TEXT, JSON, min_size=1, max_size=2), max_size=2), JSON,
)  # fmt: skip
def test_what_is_written_is_read_back(before, last, chosen, rejected, tools, option):
    options = {} if option is None else {"option": option}
    try:
        record = PreferenceRecord(
            "x",
            "math",
            (*before, last),
            (chosen, rejected),
            tools=tuple(tools),
            template_options=options,
        )
        found, ignored = parse_record(json.loads(json.dumps(to_json(record))), default_id="d")
    except BadRecordError as error:
        assert "equals 'rejected'" in str(error)
        return
    assert found == record and not ignored
