"""What is written of a record is read back as the same one, whatever its conversations are."""

import json
import math

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


FINITE = st.floats(-1e18, 1e18)


@st.composite
def records(draw) -> PreferenceRecord:
    """A pair, with or without the pivot's best, or a list; with or without scores."""
    listed = draw(st.booleans())
    count = draw(st.integers(2, 4 if listed else 3))
    scores = draw(st.none() | st.tuples(*[FINITE] * count))
    if scores is not None:  # what is there of a pair are both
        optional = slice(1, None) if listed else slice(2, None)
        lacks = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        kept = [math.nan if lack else score for lack, score in zip(lacks, scores, strict=True)]
        scores = (*scores[: optional.start], *kept[optional])
    cut = draw(st.tuples(*[st.booleans()] * count))
    option = draw(JSON)
    before = draw(st.lists(messages(*sorted(set(ROLES.values()))), max_size=3))
    return PreferenceRecord(
        "x",
        "math",
        (*before, draw(messages("user", "tool"))),
        tuple(draw(replies()) for _ in range(count)),
        scores=scores,
        listed=listed,
        cut=cut if any(cut) else (),
        tools=tuple(
            draw(st.lists(st.dictionaries(TEXT, JSON, min_size=1, max_size=2), max_size=2))
        ),
        template_options={} if option is None else {"option": option},
    )


@settings(max_examples=100)
@given(records())
def test_what_is_written_is_read_back(record):
    try:
        found, ignored = parse_record(json.loads(json.dumps(to_json(record))), default_id="d")
    except BadRecordError as error:
        assert "equals 'rejected'" in str(error) or "are equal" in str(error)
        return
    assert found == record and not ignored
