"""Split preference records in two, one part for SFT and one for preference optimization."""

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.lists import CUT
from megatron_infifpo.records.messages import Message, listed, plain_text
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import PreferenceRecord, Reply, iter_records
from megatron_infifpo.records.replies import PAIR_SCORES
from megatron_infifpo.storage.aside import Aside, make_folder


def split_records(
    files: Sequence[str],
    sft: Path,
    preference: Path,
    *,
    share: float,
    seed: int,
    on_bad: str = "error",
    lists: bool = False,
) -> tuple[int, int]:
    """Write each record to one of two files, by its prompt.

    Args:
        files: of preference records, in order.
        sft, preference: .jsonl to write.
        share, seed: see `is_sft`.
        on_bad: what to do with malformed records: "error" or "skip".
        lists: see `records.read_records`.

    Returns:
        How many records are in the SFT part, and in the preference part.

    Raises:
        UserError: bad records, an empty part, or nowhere to write.
    """
    if not 0 < share < 1:
        raise UserError(f"--share is {share}, expected a number between 0 and 1")
    outputs = (preference, sft)
    if preference.resolve() == sft.resolve():
        raise UserError(f"--sft and --preference are both {sft}, expected two files")
    for path in outputs:
        if path.suffix != ".jsonl":
            raise UserError(f"{path} is to be written as JSON lines, expected a name in .jsonl")
        if path.exists():
            raise UserError(f"{path} exists: delete it or choose another name")
        make_folder(path.parent)
    counts, report = [0, 0], ReadReport()
    records = iter_records(files, on_bad=on_bad, lists=lists, report=report)
    with Aside() as aside, contextlib.ExitStack() as stack:
        written = [
            stack.enter_context(aside.path(path).open("w", encoding="utf-8")) for path in outputs
        ]
        for record in tqdm(records, desc="split", unit=" records"):
            part = is_sft(record, share=share, seed=seed)
            written[part].write(json.dumps(to_json(record), ensure_ascii=False) + "\n")
            counts[part] += 1
        report.show()
        if not all(counts):
            raise UserError(
                f"one part of {' '.join(files)} is empty ({counts[1]} records for SFT, "
                f"{counts[0]} others); give more records or another --share or --seed"
            )
    return counts[1], counts[0]


def is_sft(record: PreferenceRecord, *, share: float, seed: int) -> bool:
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
    replies = [_reply_json(messages) for messages in record.responses]
    if record.listed:
        fields["responses"] = replies
    else:
        fields |= zip(record.names, replies, strict=True)
    if record.scores is not None:
        scores = [None if math.isnan(score) else score for score in record.scores]
        if record.listed:
            fields["scores"] = scores
        else:
            fields |= zip(PAIR_SCORES[0], scores, strict=False)
    if any(record.cut):
        fields["finish_reasons"] = [CUT if cut else "stop" for cut in record.cut]
    return fields


def _reply_json(messages: Reply) -> str | list[Message]:
    """Return a reply as text where it is read back as this text, else as messages."""
    text = plain_text(messages)
    # A text that opens like these may be read as messages.
    if text is None or text.lstrip().startswith(("[", "{", "Human:")):
        return list(messages)
    return text
