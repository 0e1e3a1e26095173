"""Split preference records in two, one part for SFT and one for preference optimization."""

import hashlib
import json
from typing import Any

from megatron_infifpo.records.records import RESPONSES, PreferenceRecord, listed, plain_text


def is_sft(record: PreferenceRecord, *, share: float = 0.5, seed: int = 0) -> bool:
    """Whether a record belongs to the SFT part.

    A pure function of the record's prompt: records of one prompt stay together, and no other
    record, file or order changes where a record goes.

    Args:
        record: the record.
        share: expected share of prompts in the SFT part, in (0, 1).
        seed: another seed gives another split.
    """
    prompt = [
        listed({**message, "content": message["content"].strip()}) for message in record.prompt
    ]
    text = json.dumps([seed, prompt], ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def to_json(record: PreferenceRecord) -> dict[str, Any]:
    """Return the record in the form that `records.read_records` reads back as the same record."""
    fields: dict[str, Any] = {"id": record.id, "domain": record.domain}
    if record.tools:
        fields["tools"] = list(record.tools)
    if record.template_options:
        fields["chat_template_kwargs"] = record.template_options
    fields["prompt"] = list(record.prompt)
    for name, messages in zip(RESPONSES, record.responses, strict=False):
        text = plain_text(messages)
        # A text that opens like these may be read as messages.
        as_text = text is not None and not text.lstrip().startswith(("[", "{", "Human:"))
        fields[name] = text if as_text else list(messages)
    return fields
