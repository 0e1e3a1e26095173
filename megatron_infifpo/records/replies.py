"""What the replies of a record must be, and what may stand beside those of a pair."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_infifpo.records.conversations import conversation
from megatron_infifpo.records.fields import check_reply, same_reply
from megatron_infifpo.records.form_readers import Parts, known_scores, number_or_nan
from megatron_infifpo.records.lists import check_count, read_cut
from megatron_infifpo.records.messages import BadRecordError, from_json, short

# Judges' numbers of a pair, by the names that data sets give them; in the order of the responses.
PAIR_SCORES = (
    ("score_chosen", "score_rejected", "score_pivot_chosen"),
    ("chosen_score", "rejected_score", "pivot_chosen_score"),
)


def add_pair_fields(value: dict[str, Any], parts: Parts, ignored: set[str]) -> None:
    """Add to a pair the pivot's own best, scores and what was cut, where the record has them.

    In data sets of pairs, fields of these names may be something else: what does not fit is left.
    """
    if value.get("pivot_chosen") is not None:
        found = conversation(value["pivot_chosen"], "pivot_chosen", ignored)
        if found[: len(parts.prompt)] == parts.prompt:  # a whole conversation
            found = found[len(parts.prompt) :]
        parts.replies += (found,)
        parts.used += ("pivot_chosen",)
    count = len(parts.replies)
    for names in PAIR_SCORES:
        _add_scores(parts, [value.get(name) for name in names[:count]], names[:count])
    entries = from_json(value.get("scores"))
    if isinstance(entries, list) and len(entries) == count:
        _add_scores(parts, entries, ("scores",))
    if value.get("finish_reasons") is not None:
        try:
            parts.cut = read_cut(value, count)
        except BadRecordError:
            return
        parts.used += ("finish_reasons",)


def _add_scores(parts: Parts, entries: Sequence[Any], names: tuple[str, ...]) -> None:
    """Take scores if there are none yet, and the first two, of the pair, are numbers."""
    if parts.scores is not None:
        return
    try:
        found = known_scores([number_or_nan(entry, "") for entry in entries])
    except BadRecordError:
        return
    if found and not any(map(math.isnan, found[:2])):
        parts.scores = found
        parts.used += names


def check_pair(parts: Parts, names: Sequence[str]) -> None:
    """Refuse a pair of which a response is none, or equals the rejected one."""
    for name, messages in zip(names, parts.replies, strict=False):
        check_reply(messages, name)
        if name != "rejected" and same_reply(messages, parts.replies[1]):
            raise BadRecordError(
                f"{name!r} equals 'rejected' ({short(messages[-1]['content'])}), expected two "
                "different responses"
            )


def check_list(parts: Parts) -> None:
    """Refuse a list of which a response is none, or all are equal."""
    check_count(parts.replies, str(parts.listed))
    for number, messages in enumerate(parts.replies):
        check_reply(messages, f"{parts.listed}[{number}]", hint="; leave it out of the list")
    first, *others = parts.replies
    if all(same_reply(first, other) for other in others):
        raise BadRecordError(
            f"all {len(parts.replies)} responses in {parts.listed!r} are equal "
            f"({short(first[-1]['content'])}), expected two that differ; --on-bad-record skip "
            "leaves such records out"
        )
