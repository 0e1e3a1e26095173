"""Log-prob datasets from the published dataset of the InfiFPO paper.

Every preference record of it holds sums and means of log-probs under the initial pivot and under
every source.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.files import RawRecord
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import RESPONSES, PreferenceRecord, iter_with_raw
from megatron_infifpo.references.imported import imported_manifest, refuse_existing
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.summary import print_summary
from megatron_infifpo.storage.aside import write_text

# sum / mean is a whole number of tokens; more than this beside it, and one of them is wrong.
COUNT_ERROR = 0.02
FIELDS = {
    f"{model}_{kind}{response}_logps"
    for model in ("ref", "fuse")
    for kind in ("", "mean_")
    for response in RESPONSES[:2]
}


def import_published(
    files: Sequence[str], names: Sequence[str], folder: Path, *, on_bad: str = "error"
) -> None:
    """Turn the paper's records into one dataset a model and a `sources.yaml`.

    Fields: `ref_chosen_logps`, `ref_mean_chosen_logps` (numbers, the initial pivot's sum and mean)
    and `fuse_chosen_logps`, `fuse_mean_chosen_logps` (lists, one number a source); the same for
    `rejected`. Token counts are sums divided by means.

    Args:
        files: preference records with these fields.
        names: of the M sources; empty for `source1` and so on.
        folder: to write `initial`, a dataset for every name, and `sources.yaml` into.
        on_bad: what to do with bad preference records; wrong numbers are always refused.

    Raises:
        UserError: a field is missing, no number, or does not fit the others; names file:line.
    """
    report = ReadReport()
    progress = tqdm(
        iter_with_raw(files, on_bad=on_bad, report=report), desc="read", unit=" records"
    )
    found = [(record, raw.where, _published(raw, record)) for record, raw in progress]
    report.show(used=report.ignored.keys() & FIELDS)
    if not found:
        raise UserError(f"there are no records in {', '.join(files)}, expected at least one")
    records, numbers = [record for record, _, _ in found], [values for _, _, values in found]
    count = numbers[0].shape[1] - 1
    names = _checked_names(names, count)
    for name in ("sources.yaml", *(f"{name}.json" for name in ("initial", *names))):
        refuse_existing(folder / name)
    for record, where, values in found:
        if values.shape[1] != count + 1:
            raise UserError(
                f"{where}: record {record.id!r} has {values.shape[1] - 1} sources, the first "
                f"record has {count}; expected the same sources in every record"
            )
    models = ["initial", *names]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                LogprobWriter(
                    folder / name,
                    responses=RESPONSES[:2],
                    manifest=imported_manifest(name, records, files, "published InfiFPO dataset"),
                    values=False,
                )
            )
            for name in models
        ]
        for record, _, values in found:
            for writer, (sums, counts) in zip(writers, values.transpose(1, 2, 0), strict=True):
                writer.add_sums(record.id, sums.tolist(), counts.astype(int).tolist())
    sources = {"initial": "initial", "sources": [{"name": n, "logprobs": n} for n in names]}
    write_text(folder / "sources.yaml", yaml.safe_dump(sources, sort_keys=False))
    for name in models:
        print_summary(LogprobStore(folder / name), [record.domain for record in records])
    print(f"\nwrote {folder}/sources.yaml")


def _checked_names(names: Sequence[str], count: int) -> list[str]:
    """Name the sources, which become files."""
    names = list(names) or [f"source{i + 1}" for i in range(count)]
    unusable = any(Path(name).name != name for name in names)
    if len(names) != count or len({"initial", *names}) != count + 1 or unusable:
        raise UserError(
            f"--names gives {', '.join(names)}, expected {count} different names: the records have "
            f"log-probs of {count} sources; 'initial' is the initial pivot's"
        )
    return names


def _published(raw: RawRecord, record: PreferenceRecord) -> np.ndarray:
    """Return sums and counts of a record: `[responses, initial and sources, 2]`."""
    if record.listed:
        raise UserError(
            f"{raw.where}: record {record.id!r} is a list of responses, expected a pair: the "
            "published form has log-probs of pairs alone"
        )
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
