"""Turn files of sampled responses into a file of preference pairs, or of lists with scores."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import (
    check_choice,
    check_files,
    check_number,
    check_types,
)
from megatron_infifpo.records.read_report import report_skipped
from megatron_infifpo.records.records import ON_BAD, PreferenceRecord
from megatron_infifpo.records.split import to_json
from megatron_infifpo.responses.choosing import choose_list, choose_pair
from megatron_infifpo.responses.judging import LeftOut, label
from megatron_infifpo.responses.labels import Responses, read_responses
from megatron_infifpo.responses.scorers import Judge, open_judge
from megatron_infifpo.storage.aside import make_folder, whole_file


@dataclass(frozen=True)
class LabellingJob:
    """What is judged, and by whom.

    Attributes:
        input: files that `sample` wrote, one a model.
        output: .jsonl of pairs or lists; scores are kept in OUTPUT.scores.
        judge: of the responses.
        pivot: its name in the files, for WRPO; or None.
        longest: write lists, of so many responses at most; None: write pairs.
        on_bad_record: "error" or "skip", for lines and prompts that cannot be judged.
        keep_cut: judge responses that were cut, too; they are marked as such.
        cut_penalty: subtracted from the score of a response of a list that was cut.
    """

    input: Sequence[str]
    output: Path
    judge: Judge
    pivot: str | None = None
    longest: int | None = None
    on_bad_record: str = "error"
    keep_cut: bool = False
    cut_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: an unknown choice, no files, or an option without effect.
        """
        check_files(self, "input")
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_types(self)
        if self.longest is not None and self.longest < 2:
            raise UserError(f"--list is {self.longest}, expected at least 2 responses")
        check_number(self, "cut_penalty")
        if self.longest is not None and self.pivot is not None:
            raise UserError(
                "--pivot has no effect with --list: it is for the pivot's own best response in "
                "pairs; a list of the pivot alone is made of its --input alone"
            )
        if self.cut_penalty and not (self.longest is not None and self.keep_cut):
            raise UserError(
                "--cut-penalty has no effect without --list and --keep-cut: it is for lists that "
                "have responses that were cut"
            )

    @property
    def kind(self) -> str:
        """What the output has, in the plural."""
        return "pairs" if self.longest is None else "lists"

    def choose(self, responses: Responses, scores: Sequence[float]) -> PreferenceRecord | str:
        """Return a prompt's record, or why there is none."""
        if self.longest is None:
            return choose_pair(responses, scores, self.pivot)
        return choose_list(responses, scores, self.longest, self.cut_penalty)


@dataclass(frozen=True)
class Labelled:
    """What came of a labelling job.

    Attributes:
        lengths: how many records have so many responses.
        prompts: how many there were.
        dropped: prompts without a record, by reason.
        unused: responses that are not judged, by fault.
    """

    lengths: Counter[int]
    prompts: int
    dropped: LeftOut
    unused: Counter[str]

    @property
    def left_out(self) -> list[str]:
        """What gave nothing, in words: a line a reason."""
        unused = self.unused.most_common()
        return self.dropped.lines() + [
            f"not judged {number} responses: {fault}" for fault, number in unused
        ]


def label_responses(job: LabellingJob) -> Labelled:
    """Judge, and write the pairs or the lists.

    Raises:
        UserError: the output is there already, a file or the judge cannot be used, or no prompt
            gives a record.
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
    dropped = LeftOut()
    make_folder(job.output.parent)
    cache = Path(f"{job.output}.scores")
    lengths: Counter[int] = Counter()
    with whole_file(job.output) as aside, aside.open("w", encoding="utf-8") as file:
        bar = tqdm(responses.values(), desc="label", unit="prompt")
        for record in label(bar, score, name, cache, job.choose, dropped, skip=skip):
            file.write(json.dumps(to_json(record), ensure_ascii=False) + "\n")
            lengths[len(record.responses)] += 1
        found = Labelled(lengths, len(responses), dropped, unused)
        if not lengths:
            raise UserError(f"no prompt gives a {job.kind[:-1]}: {'; '.join(found.left_out)}")
    return found
