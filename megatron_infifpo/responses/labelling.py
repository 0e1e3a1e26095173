"""Turn files of sampled responses into a file of preference pairs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_files, check_types
from megatron_infifpo.records.read_report import report_skipped
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.records.split import to_json
from megatron_infifpo.responses.labels import label, read_responses
from megatron_infifpo.responses.scorers import Judge, open_judge
from megatron_infifpo.storage.aside import make_folder, whole_file


@dataclass(frozen=True)
class LabellingJob:
    """What is judged, and by whom.

    Attributes:
        input: files that `sample` wrote, one a model.
        output: .jsonl of pairs; scores are kept in OUTPUT.scores.
        judge: of the responses.
        pivot: its name in the files, for WRPO; or None.
        on_bad_record: "error" or "skip", for lines and prompts that cannot be judged.
        keep_cut: judge responses that were cut, too.
    """

    input: Sequence[str]
    output: Path
    judge: Judge
    pivot: str | None = None
    on_bad_record: str = "error"
    keep_cut: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: an unknown choice, or no files.
        """
        check_files(self, "input")
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_types(self)


@dataclass(frozen=True)
class Labelled:
    """What came of a labelling job.

    Attributes:
        pairs, prompts: how many.
        dropped: prompts without a pair, by reason.
        unused: responses that are not judged, by fault.
    """

    pairs: int
    prompts: int
    dropped: Counter[str]
    unused: Counter[str]


def label_responses(job: LabellingJob) -> Labelled:
    """Judge, and write the pairs.

    Raises:
        UserError: the output is there already, a file or the judge cannot be used, or no prompt
            gives a pair.
    """
    if job.output.exists():
        raise UserError(f"{job.output} exists: delete it or choose another name")
    skip = job.on_bad_record == "skip"
    skipped: list[str] | None = [] if skip else None
    unused: Counter[str] = Counter()
    responses = read_responses(job.input, keep_cut=job.keep_cut, skipped=skipped, dropped=unused)
    report_skipped(skipped or [])
    if job.pivot is not None:
        models = sorted({m for r in responses.values() for given in r.models for m in given})
        if job.pivot not in models:
            raise UserError(f"--pivot is {job.pivot!r}, expected one of {', '.join(models)}")
    score, name = open_judge(job.judge), job.judge.identity
    dropped: Counter[str] = Counter()
    make_folder(job.output.parent)
    cache = Path(f"{job.output}.scores")
    count = 0
    with whole_file(job.output) as aside, aside.open("w", encoding="utf-8") as file:
        bar = tqdm(responses.values(), desc="label", unit="prompt")
        for record in label(bar, score, name, cache, job.pivot, dropped, skip=skip):
            file.write(json.dumps(to_json(record), ensure_ascii=False) + "\n")
            count += 1
        if not count:
            unused_ones = f"; responses that are not judged: {dict(unused)}" if unused else ""
            raise UserError(f"no prompt gives a pair: {dict(dropped)}{unused_ones}")
    return Labelled(count, len(responses), dropped, unused)
