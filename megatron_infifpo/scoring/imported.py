"""Log-prob datasets from log-probs that others have computed.

Two forms are read: the published dataset of the InfiFPO paper, with sums and means in every
preference record, and JSONL files with a log-prob for every token, as vLLM's `prompt_logprobs`.
What comes out is marked as imported: nobody here has seen the weights.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from megatron_infifpo import __version__
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.logprob_store import LogprobStore
from megatron_infifpo.data.logprob_writer import LogprobWriter
from megatron_infifpo.data.record_files import RawRecord, iter_raw
from megatron_infifpo.data.records import (
    RESPONSES,
    PreferenceRecord,
    read_records,
    records_fingerprint,
)
from megatron_infifpo.data.tokenization import ChatTokenizer, TokenizedRecord
from megatron_infifpo.scoring.summary import print_summary

MADE_BY = "tools/import_logprobs.py"
UNKNOWN_TOKENIZER = dict.fromkeys(
    (
        "path",
        "tokenizer_sha256",
        "chat_template_sha256",
        "chat_template",
        "end_of_turn",
        "system_message",
    )
)
# sum / mean is a whole number of tokens; more than this beside it, and one of them is wrong.
COUNT_ERROR = 0.02


def import_published(files: Sequence[str], names: Sequence[str], folder: Path) -> None:
    """Turn the paper's records into one dataset a model and a `sources.yaml`.

    Fields: `ref_chosen_logps`, `ref_mean_chosen_logps` (numbers, the initial pivot's sum and mean)
    and `fuse_chosen_logps`, `fuse_mean_chosen_logps` (lists, one number a source); the same for
    `rejected`. Token counts are sums divided by means.

    Args:
        files: preference records with these fields.
        names: of the M sources; empty for `source1` and so on.
        folder: to write `initial`, a dataset for every name, and `sources.yaml` into.

    Raises:
        UserError: a field is missing, no number, or does not fit the others; names file:line.
    """
    records = read_records(files)
    numbers = [_published(raw, record) for record, raw in zip(records, _raw(files), strict=True)]
    if not numbers:
        raise UserError(f"there are no records in {', '.join(files)}, expected at least one")
    count = numbers[0].shape[1] - 1
    names = list(names) or [f"source{i + 1}" for i in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise UserError(
            f"--names gives {', '.join(names)}, expected {count} different names: the records have "
            f"log-probs of {count} sources"
        )
    for record, raw, found in zip(records, _raw(files), numbers, strict=True):
        if found.shape[1] != count + 1:
            raise UserError(
                f"{raw.where}: record {record.id!r} has {found.shape[1] - 1} sources, the first "
                f"record has {count}; expected the same sources in every record"
            )
    models = ["initial", *names]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                LogprobWriter(
                    folder / name,
                    responses=RESPONSES[:2],
                    manifest=_manifest(name, records, files, "published InfiFPO dataset"),
                    values=False,
                )
            )
            for name in models
        ]
        for record, found in zip(records, numbers, strict=True):
            for writer, (sums, counts) in zip(writers, found.transpose(1, 2, 0), strict=True):
                writer.add_sums(record.id, sums.tolist(), counts.astype(int).tolist())
    sources = {"initial": "initial", "sources": [{"name": n, "logprobs": n} for n in names]}
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources, sort_keys=False))
    for name in models:
        print_summary(LogprobStore(folder / name), [record.domain for record in records])
    print(f"\nwrote {folder}/sources.yaml")


def _published(raw: RawRecord, record: PreferenceRecord) -> np.ndarray:
    """Return sums and counts of a record: `[responses, initial and sources, 2]`."""
    result = []
    for response in RESPONSES[:2]:
        sums, means = (
            [*_numbers(raw, f"ref_{kind}{response}_logps", 1), *_numbers(raw, name, None)]
            for kind, name in (
                ("", f"fuse_{response}_logps"),
                ("mean_", f"fuse_mean_{response}_logps"),
            )
        )
        if len(sums) != len(means):
            raise UserError(
                f"{raw.where}: record {record.id!r} has {len(sums) - 1} sums and "
                f"{len(means) - 1} means of {response!r}, expected one of each for every source"
            )
        for total, mean in zip(sums, means, strict=True):
            tokens = total / mean if mean else math.nan
            if not abs(tokens - round(tokens) if math.isfinite(tokens) else tokens) <= COUNT_ERROR:
                raise UserError(
                    f"{raw.where}: record {record.id!r} has a sum of {total} and a mean of {mean} "
                    f"for {response!r}, expected a whole number of tokens, not {tokens:.3f}"
                )
        result.append([[s, round(s / m)] for s, m in zip(sums, means, strict=True)])
    if len(result[0]) != len(result[1]):
        raise UserError(
            f"{raw.where}: record {record.id!r} has {len(result[0]) - 1} sources for 'chosen' and "
            f"{len(result[1]) - 1} for 'rejected', expected the same"
        )
    return np.array(result, dtype=np.float64)


def _numbers(raw: RawRecord, name: str, count: int | None) -> list[float]:
    """Return a field's numbers: one number, or a list of `count` (any number for None)."""
    found = raw.value.get(name)
    values = found if isinstance(found, list) else [found]
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong or len(values) != (count or len(values)):
        kind = "a number" if count == 1 else "a list of numbers, one for every source"
        raise UserError(f"{raw.where}: field {name!r} is {found!r}, expected {kind}")
    return [float(value) for value in values]


def import_tokens(
    files: Sequence[str],
    logprob_files: Sequence[str],
    output: str,
    *,
    name: str,
    tokenizer: ChatTokenizer | None,
    on_bad: str = "error",
    mask_missing: bool = False,
) -> None:
    """Turn a log-prob for every token into a dataset.

    Each line is `{"id", "chosen", "rejected"[, "pivot_chosen"]}` in any order, and each response a
    list of numbers, one a response token, end of turn included, or what vLLM returns for the
    prompt's and the response's tokens together: `{"prompt_logprobs": [null, {"17": {"logprob":
    -0.5, ...}}, ...]}`, as it is or as the list alone.

    Args:
        files: the preference records.
        logprob_files: the log-probs.
        output: prefix of the dataset.
        name: of the model.
        tokenizer: the model's. It says which tokens are the response's and checks that just these
            were scored; without it only lists of numbers can be read, unchecked.
        on_bad: what to do with bad preference records.
        mask_missing: mask records without log-probs, else refuse them.

    Raises:
        UserError: log-probs of an unknown record, twice of one, of other tokens, or missing ones.
    """
    records = read_records(files, on_bad=on_bad)
    places = {record.id: i for i, record in enumerate(records)}
    found: list[list[np.ndarray] | None] = [None] * len(records)
    for raw in tqdm(_raw(logprob_files), desc="read log-probs", unit=" records"):
        if raw.error or not isinstance(raw.value, dict):
            raise UserError(f"{raw.where}: {raw.error or 'expected an object with id and chosen'}")
        place = places.get(str(raw.value.get("id")))
        if place is None:
            raise UserError(
                f"{raw.where}: no preference record has the id {raw.value.get('id')!r}; were these "
                f"log-probs computed for {', '.join(files)}?"
            )
        if found[place] is not None:
            raise UserError(f"{raw.where}: log-probs of {records[place].id!r} for the second time")
        tokens = tokenizer.encode(records[place]) if tokenizer else None
        found[place] = _responses(raw, records[place], tokens)
    missing = [record.id for record, values in zip(records, found, strict=True) if values is None]
    if missing and not mask_missing:
        raise UserError(
            f"{len(missing)} of {len(records)} records have no log-probs, the first is "
            f"{missing[0]!r}; expected all of them (--mask-missing leaves the others out)"
        )
    manifest = _manifest(name, records, files, "log-probs by token")
    manifest["imported"]["files"] = list(map(str, logprob_files))
    if tokenizer:
        manifest["tokenizer"] = tokenizer.describe()
    names = RESPONSES[: len(records[0].responses)]
    with LogprobWriter(output, responses=names, manifest=manifest) as writer:
        for record, values in zip(records, found, strict=True):
            if values is None:
                writer.mask(record.id, "not among the imported log-probs")
            else:
                writer.add(record.id, values)
    print_summary(LogprobStore(output), [record.domain for record in records])


def _responses(
    raw: RawRecord, record: PreferenceRecord, tokens: TokenizedRecord | None
) -> list[np.ndarray]:
    """Return the log-probs of each response of a line."""
    result = []
    for number in range(len(record.responses)):
        name = RESPONSES[number]
        value = raw.value.get(name)
        if isinstance(value, dict):
            value = value.get("prompt_logprobs")
        where = f"{raw.where}: {name!r} of record {record.id!r}"
        if not isinstance(value, list) or not value:
            raise UserError(
                f"{where} is missing, expected a list of log-probs or an object with "
                "prompt_logprobs"
            )
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            wanted = len(tokens.response_ids[number]) if tokens else len(value)
            if len(value) != wanted:
                raise UserError(
                    f"{where} has {len(value)} log-probs, but the tokenizer makes {wanted} tokens "
                    "of the response with its end of turn"
                )
            result.append(np.array(value, dtype=np.float32))
            continue
        if tokens is None:
            raise UserError(
                f"{where} holds more than numbers; give --tokenizer, so that the response's tokens "
                "are known from the prompt's"
            )
        result.append(_vllm(value, tokens, number, where))
    return result


def _vllm(value: list, tokens: TokenizedRecord, number: int, where: str) -> np.ndarray:
    """Pick the response tokens' log-probs out of vLLM's `prompt_logprobs`."""
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


def _raw(files: Sequence[str]) -> Iterator[RawRecord]:
    for file in files:
        yield from iter_raw(Path(file))


def _manifest(
    name: str, records: Sequence[PreferenceRecord], files: Sequence[str], form: str
) -> dict[str, Any]:
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
