"""A log-prob dataset from JSONL with a log-prob for every token, as vLLM's `prompt_logprobs`.

What comes out is marked as imported: nobody here has seen the weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_infifpo import __version__
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.files import RawRecord, iter_raw
from megatron_infifpo.records.messages import kind
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import (
    PreferenceRecord,
    read_records,
    records_fingerprint,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.summary import print_summary
from megatron_infifpo.tokens.dataset import TOKENIZER_SCHEMA
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

MADE_BY = "infifpo import-logprobs"
UNKNOWN_TOKENIZER = dict.fromkeys((*TOKENIZER_SCHEMA, "end_of_turn", "system_message"))


def import_tokens(
    files: Sequence[str],
    logprob_files: Sequence[str],
    output: str,
    *,
    name: str,
    tokenizer: ChatTokenizer | None,
    on_bad: str = "error",
    lists: bool = False,
    mask_missing: bool = False,
) -> None:
    """Turn a log-prob for every token into a dataset.

    Each line is `{"id", "chosen", "rejected"[, "pivot_chosen"]}`, of a list `{"id", "responses":
    [one entry a response]}`, in any order. Each response has a list of numbers, one a response
    token (end of turn included) or one a scored token, or what vLLM returns for the prompt's and
    the response's tokens together: `{"prompt_logprobs": [null, {"17": {"logprob": -0.5, ...}},
    ...]}`, as it is or as the list alone.

    Args:
        files: the preference records.
        logprob_files: the log-probs.
        output: prefix of the dataset.
        name: of the model.
        tokenizer: the model's. It says which tokens are the response's and checks that just these
            were scored; without it only lists of numbers can be read, unchecked.
        on_bad: what to do with bad preference records; "skip" also masks those that the tokenizer's
            chat template refuses.
        lists: see `records.read_records`.
        mask_missing: mask records without log-probs, else refuse them.

    Raises:
        UserError: log-probs of an unknown record, twice of one, of other tokens, or missing ones.
    """
    refuse_existing(Path(f"{output}.json"))
    report = ReadReport()
    records = read_records(files, on_bad=on_bad, lists=lists, report=report)
    report.show()
    if not records:
        raise UserError(f"there are no records in {', '.join(files)}, expected at least one")
    found = _read(records, logprob_files, tokenizer, on_bad)
    missing = [record.id for record, values in zip(records, found, strict=True) if values is None]
    if missing and not mask_missing:
        raise UserError(
            f"{len(missing)} of {len(records)} records have no log-probs, the first is "
            f"{missing[0]!r}; expected all of them (--mask-missing leaves the others out)"
        )
    manifest = imported_manifest(name, records, files, "log-probs by token")
    manifest["imported"]["files"] = list(map(str, logprob_files))
    if tokenizer:
        manifest["tokenizer"] = tokenizer.describe()
    names = max((record.names for record in records), key=len)
    with LogprobWriter(output, responses=names, manifest=manifest) as writer:
        for record, values in zip(records, found, strict=True):
            if values is None or isinstance(values, str):
                writer.mask(record.id, values or "not among the imported log-probs")
            else:
                writer.add(record.id, values)
    print_summary(LogprobStore(output), [record.domain for record in records])


def _read(
    records: Sequence[PreferenceRecord],
    files: Sequence[str],
    tokenizer: ChatTokenizer | None,
    on_bad: str,
) -> list[list[np.ndarray] | str | None]:
    """Return every record's log-probs by response, why it has none, or None: no file has any."""
    places = {record.id: i for i, record in enumerate(records)}
    found: list[list[np.ndarray] | str | None] = [None] * len(records)
    for raw in tqdm(raw_records(files), desc="read log-probs", unit=" records"):
        if raw.error or not isinstance(raw.value, dict):
            raise UserError(f"{raw.where}: {raw.error or 'expected an object with id'}")
        place = places.get(str(raw.value.get("id")))
        if place is None:
            raise UserError(
                f"{raw.where}: no preference record has the id {raw.value.get('id')!r}; were these "
                "log-probs computed for other records?"
            )
        if found[place] is not None:
            raise UserError(f"{raw.where}: log-probs of {records[place].id!r} for the second time")
        tokens = encode_or_refuse([records[place]], tokenizer)[0] if tokenizer else None
        if not isinstance(tokens, str):
            found[place] = _responses(raw, records[place], tokens)
        elif on_bad == "skip":
            found[place] = tokens
        else:
            raise UserError(
                f"{raw.where}: record {records[place].id!r} cannot be scored: {tokens}; "
                "--on-bad-record skip masks such records"
            )
    return found


def _responses(
    raw: RawRecord, record: PreferenceRecord, tokens: TokenizedRecord | None
) -> list[np.ndarray]:
    """Return the log-probs of each response of a line."""
    given, result = raw.value, []
    if record.listed:
        entries, count = raw.value.get("responses"), len(record.responses)
        if not isinstance(entries, list) or len(entries) != count:
            found = f"a list of {len(entries)}" if isinstance(entries, list) else kind(entries)
            raise UserError(
                f"{raw.where}: 'responses' of record {record.id!r} is {found}, expected a list "
                f"with one entry for each of its {count} responses"
            )
        given = dict(zip(record.names, entries, strict=True))
    for number, name in enumerate(record.names):
        value = given.get(name)
        if isinstance(value, dict):
            value = value.get("prompt_logprobs")
        where = f"{raw.where}: {name!r} of record {record.id!r}"
        if not isinstance(value, list) or not value:
            raise UserError(
                f"{where} is missing, expected a list of log-probs or an object with "
                "prompt_logprobs"
            )
        mark = scored_marks(tokens.response_ids, tokens.scored)[number] if tokens else None
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            result.append(_numbers(value, mark, where))
        elif tokens is None or mark is None:
            raise UserError(
                f"{where} holds more than numbers; give --tokenizer, so that the response's tokens "
                "are known from the prompt's"
            )
        else:
            result.append(_vllm(value, tokens, number, where)[mark])
    return result


def _numbers(value: list, mark: np.ndarray | None, where: str) -> np.ndarray:
    """Return the numbers of the scored tokens; of an unknown tokenizer, all."""
    numbers = np.array(value, dtype=np.float32)
    if mark is None or len(value) == int(mark.sum()):
        return numbers
    if len(value) != len(mark):
        scored = "" if mark.all() else f", {int(mark.sum())} of them scored,"
        raise UserError(
            f"{where} has {len(value)} log-probs, but the tokenizer makes {len(mark)} tokens"
            f"{scored} of the response with its end of turn"
        )
    return numbers[mark]


def _vllm(value: list, tokens: TokenizedRecord, number: int, where: str) -> np.ndarray:
    """Pick the response tokens' log-probs, scored or not, out of vLLM's `prompt_logprobs`."""
    ids = [*tokens.prompt_ids.tolist(), *tokens.response_ids[number].tolist()]
    if len(value) != len(ids):
        raise UserError(
            f"{where} has {len(value)} positions, but the tokenizer makes {len(ids)} tokens of "
            "prompt and response; score the ids that it makes"
        )
    first, result = len(tokens.prompt_ids), []
    for position, token in enumerate(ids):
        entry = value[position]
        if position == 0 and entry is None:  # nothing predicts the first token
            continue
        picked = entry.get(str(token)) if isinstance(entry, dict) else None
        logprob = picked.get("logprob") if isinstance(picked, dict) else picked
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise UserError(
                f"{where} has no log-prob of token {token} at position {position}, found "
                f"{str(entry)[:60]}; other tokens were scored than the tokenizer makes"
            )
        if position >= first:
            result.append(logprob)
    return np.array(result, dtype=np.float32)


def refuse_existing(path: Path) -> None:
    """Raise a UserError if a file exists, rather than replace it."""
    if path.exists():
        raise UserError(f"{path} exists: delete it or choose another --output")


def raw_records(files: Sequence[str]) -> Iterator[RawRecord]:
    """Yield the decoded records of files, unchecked."""
    for file in files:
        yield from iter_raw(Path(file), wanted="log-probs")


def imported_manifest(
    name: str, records: Sequence[PreferenceRecord], files: Sequence[str], form: str
) -> dict[str, Any]:
    """Return what is known of imported log-probs: whose they are said to be, and of what."""
    return {
        "model": name,
        "weights_sha256": None,
        "tokenizer": UNKNOWN_TOKENIZER,
        "records_sha256": records_fingerprint(records),
        "backend": "imported",
        "dtype": "unknown dtype",
        "versions": {"megatron_infifpo": __version__},
        "made_by": MADE_BY,
        "source_files": list(map(str, files)),
        "imported": {"form": form, "files": list(map(str, files))},
    }
